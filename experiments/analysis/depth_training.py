"""Units of work of the depth study: training, measures of the routing, removal, transfer."""

import dataclasses
import itertools

import jax
import ml_collections
import numpy as np

from experiments import resumable_training as resumable
from experiments.analysis import depth_quantities as quantities
from qlora_jax.adapters import rerouting
from qlora_jax.studies import study
from qlora_jax.training import optimizer
from qlora_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Arm:
  """The parameter groups that a run on a new task takes from the source, and those it freezes.

  Groups: 'memory' (atoms, keys), 'router' and 'other' (the factors A and B). A group that is not
  taken is drawn again. A group that is not frozen is trained.
  """

  name: str
  taken: tuple[str, ...]
  frozen: tuple[str, ...]


ARMS = (
  Arm("source memory frozen", ("memory",), ("memory",)),
  Arm("random memory frozen", (), ("memory",)),
  Arm("router alone, source memory", ("memory", "other"), ("memory", "other")),
  Arm("router alone, random memory", ("other",), ("memory", "other")),
  Arm("all from scratch", (), ()),
  Arm("source memory, all trained", ("memory",), ()),
)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A source and a new task; `parts` None stands for the whole task."""

  source: str
  target: str
  source_parts: tuple[int, ...] | None = None
  target_parts: tuple[int, ...] | None = None

  @property
  def name(self) -> str:
    return f"{_named(self.source, self.source_parts)} → {_named(self.target, self.target_parts)}"


PAIRS = (
  Pair("multi_target", "regimes"),
  Pair("multi_target", "multi_target", (0, 1, 2), (3, 4, 5)),
  Pair("regimes", "multi_target"),
)


def unit_count(points: list[dict]) -> int:
  """The number of units of work."""
  settings = {setting_name(point) for point in points}
  return 2 * len(settings) + len(PAIRS) * (len(ARMS) + 1)


def run(bench: resumable.Bench, points: list[dict]) -> dict[str, list[dict]]:
  """The rows of all units by kind; makes units that the work directory lacks.

  Returns:
    'runs', a row per training run; 'usage', 'effects' and 'routing' of the trained networks.
  """
  rows = {"runs": [], "usage": [], "effects": [], "routing": []}
  settings = study.expand(bench.config, points)
  deeper = [pair for pair in settings if pair[0].model.layers != bench.config.model.layers]
  for config, rates in [pair for pair in settings if pair not in deeper]:
    _setting(bench, config, rates, rows)
  for pair in PAIRS:
    _pair(bench, pair, settings[0][1], rows)
  for config, rates in deeper:  # last: they take longest
    _setting(bench, config, rates, rows)
  return rows


def _setting(bench, config, rates, rows) -> None:
  name = setting_name(config)
  rows["runs"] += _source(bench, name, config, rates, None)
  measured = bench.once(f"structure of {name}", lambda: measure(bench, name, config))
  for kind, kind_rows in measured.items():
    rows[kind] += kind_rows


def _pair(bench, pair: Pair, rates, rows) -> None:
  name = bench.config.transfer.adapter
  config = bench.with_fields({"data.task": pair.source, "adapter.name": name})
  source = setting_name(config, pair.source_parts)
  source_runs = _source(bench, source, config, rates, pair.source_parts)
  rows["runs"] += [run for run in source_runs if run not in rows["runs"]]
  for arm in ARMS:
    transferred = bench.once(
      f"{pair.name}, {arm.name}", lambda a=arm: {"runs": transfer(bench, pair, a, source, rates)}
    )
    rows["runs"] += transferred.get("runs", [])


def setting_name(config, wanted: tuple[int, ...] | None = None) -> str:
  """A setting's name in units and tables, from its config or from its point of `get_hyper`."""
  if not isinstance(config, dict):
    config = {
      "data.task": config.data.task,
      "adapter.name": config.adapter.name,
      "model.layers": config.model.layers,
    }
  task = _named(config["data.task"], wanted)
  return f"{task} {config['adapter.name']} {config.get('model.layers', 4)} blocks"


def _source(bench, name, config, rates, wanted) -> list[dict]:
  """Trains a setting, and saves the weights of search and final seeds at the chosen rate."""

  def make():
    program, trained = bench.program(config), {}

    def train(runs):
      states, frozen = bench.init(config, program, runs)
      rows, params = _fit(bench, config, program, states, frozen, runs, wanted)
      for index, run in enumerate(runs):
        trained[run] = jax.tree.map(lambda leaf, index=index: leaf[index], params)
      return rows

    rows = resumable.search_and_final(config, rates, train)
    rate = rows[-1]["learning_rate"]
    chosen = [trained[(seed, rate)] for seed in _saved_seeds(config)]
    bench.save(name, jax.tree.map(lambda *leaves: np.stack(leaves), *chosen))
    return {"runs": [{"kind": "source", "setting": name, "arm": "", **row} for row in rows]}

  return bench.once(name, make).get("runs", [])


def transfer(bench, pair: Pair, arm: Arm, source: str, rates) -> list[dict]:
  """Rows of one arm on one new task, with the arm's learning-rate search."""
  name = bench.config.transfer.adapter
  config = bench.with_fields({"data.task": pair.target, "adapter.name": name})
  program = bench.program(config, bench.config.transfer.steps, arm.frozen)
  seeds = _saved_seeds(config)
  fresh, _ = bench.init(config, program, [(seed, 0.0) for seed in seeds])
  source_params = bench.load(source, fresh.params)

  def train(runs):
    drawn, frozen = bench.init(config, program, runs)
    places = np.array([seeds.index(seed) for seed, _ in runs])
    params_of_runs = jax.tree.map(lambda leaf: leaf[places], source_params)
    params = optimizer.transplant(drawn.params, params_of_runs, arm.taken)
    states = program.start(params, resumable.rates_of(runs))
    return _fit(bench, config, program, states, frozen, runs, pair.target_parts)[0]

  rows = resumable.search_and_final(config, rates, train)
  return [{"kind": "transfer", "setting": pair.name, "arm": arm.name, **row} for row in rows]


def _fit(bench, config, program, states, frozen, runs, wanted):
  """Trains runs on the wanted parts; returns their rows, means over these parts, and weights."""
  data = bench.data(config, program, {seed: wanted for seed, _ in runs})
  states = bench.train(program, states, frozen, data, runs)
  chosen = list(range(len(resumable.part_names(config.data.task)))) if wanted is None else wanted
  base = bench.unadapted(config)[list(chosen)].mean()
  validation, test = (
    bench.errors(config, program, states, frozen, data, runs, split)[:, list(chosen)].mean(axis=1)
    for split in ("validation", "test")
  )
  trained = optimizer.count_trained(states.params, program.optimizer.frozen) // len(runs)
  rows = [
    {
      "seed": seed,
      "learning_rate": rate,
      "validation_mse": float(validation[index]),
      "test_mse": float(test[index]),
      "base_mse": float(base),
      "trainable_params": trained,
      "steps": program.optimizer.steps,
    }
    for index, (seed, rate) in enumerate(runs)
  ]
  return rows, jax.device_get(states.params)


def measure(bench, name: str, config: ml_collections.ConfigDict) -> dict[str, list[dict]]:
  """Usage, similarity and removal of the final seeds of a trained setting, on its test rows."""
  task, seeds = config.data.task, _saved_seeds(config)
  program = bench.program(config)
  runs = [(seed, 0.0) for seed in seeds]
  untrained, frozen = bench.init(config, program, runs)
  trained = bench.load(name, untrained.params)
  final = [seeds.index(seed) for seed in config.protocol.final_seeds]
  data = bench.data(config, program, {seeds[0]: None})
  batch, test = data.whole(seeds[0], "test"), data.splits[seeds[0]]["test"]
  part, names = resumable.parts(task, test), resumable.part_names(task)

  def weights(params, frozen, batch):  # [N, n, M]
    variables = step_lib.variables(program.model, params, frozen)
    return program.model.apply(variables, batch.features, batch.instruction).routing.weights[:, 0]

  def without(params, kept, frozen, batch):  # [n]
    variables = step_lib.variables(program.model, params, frozen)
    inputs = (batch.features, batch.instruction)
    return rerouting.without_atoms(program.model, variables, kept, *inputs).values

  weights, without = jax.jit(weights), jax.jit(jax.vmap(without, in_axes=(0, None, None, None)))
  rows = {"usage": [], "effects": [], "routing": []}
  for state, tree in (("untrained", untrained.params), ("trained", trained)):
    for seed, index in zip(config.protocol.final_seeds, final, strict=True):
      seed_params = jax.tree.map(lambda leaf, i=index: leaf[i], tree)
      routed = np.asarray(weights(seed_params, frozen, batch))
      shares = quantities.shares(routed, part, len(names))
      rows["usage"] += [
        {
          "setting": name,
          "state": state,
          "seed": seed,
          "part": names[g],
          "block": b,
          "atom": m,
          "weight": float(shares[g, b, m]),
        }
        for g, b, m in np.ndindex(shares.shape)
      ]
      row = {
        "setting": name,
        "state": state,
        "seed": seed,
        "effective_support": quantities.effective_support(routed),
      }
      rng = np.random.default_rng(seed)
      for kind, similarity in quantities.SIMILARITIES.items():
        shuffled = [
          quantities.across_parts(
            quantities.shares(routed, rng.permutation(part), len(names)), similarity
          )
          for _ in range(config.baseline.label_draws)
        ]
        row[f"parts_{kind}_labels_shuffled"] = float(np.mean(shuffled))
      rows["routing"].append(row)
  chosen = jax.tree.map(lambda leaf: leaf[np.array(final)], trained)
  blocks, atoms = config.model.layers, program.model.adapter.atoms
  for block, atom in [(-1, -1), *itertools.product((-1, *range(blocks)), range(atoms))]:
    kept = np.ones((blocks, atoms), bool)
    if atom >= 0:
      kept[slice(None) if block < 0 else block, atom] = False
    error = np.square(np.asarray(without(chosen, kept, frozen, batch)) - test.clean)
    for seed, seed_error in zip(config.protocol.final_seeds, error, strict=True):
      by_part = resumable.by_part(seed_error, part, task)
      rows["effects"] += [
        {"setting": name, "seed": seed, "block": block, "atom": atom, "part": label, "mse": value}
        for label, value in (
          ("all", float(seed_error.mean())),
          *zip(names, by_part.tolist(), strict=True),
        )
        if block < 0 or label == "all"
      ]
  return rows


def _saved_seeds(config) -> tuple[int, ...]:
  return (*config.protocol.search_seeds, *config.protocol.final_seeds)


def _named(task: str, wanted) -> str:
  return task if wanted is None else f"{task} {wanted[0] + 1}-{wanted[-1] + 1}"
