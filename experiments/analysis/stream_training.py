"""Units of work of the stream study: one arm on the parts of one task, with its search."""

import dataclasses

import ml_collections
import numpy as np

from experiments import resumable_training as resumable
from qlora_jax.studies import study
from qlora_jax.training import optimizer

# The adapter of each family on each task. Where the parts differ by the instruction alone, it reads
# the instruction.
ADAPTERS = {
  "multi_target": {"lora": "lora_input", "queryable": "queryable_query"},
  "regimes": {"lora": "lora", "queryable": "queryable"},
}


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to learn the parts.

  Attributes:
    name: in tables.
    family: a key of the entries of `ADAPTERS`.
    order: 'stream', one part after another; 'joint', all at once for as many steps in all; 'alone',
      each part from a fresh adapter.
    first, later: parameter groups that are frozen on the first part, and on those after it.
  """

  name: str
  family: str
  order: str = "stream"
  first: tuple[str, ...] = ()
  later: tuple[str, ...] = ()


ARMS = (
  Arm("LoRA", "lora"),
  Arm("Queryable, free atoms", "queryable"),
  Arm("Queryable, atoms frozen from the start", "queryable", first=("atoms",), later=("atoms",)),
  Arm("LoRA, jointly", "lora", "joint"),
  Arm("Queryable, jointly", "queryable", "joint"),
  Arm("Queryable, router alone after the first", "queryable", later=("memory", "other")),
  Arm("LoRA, each alone", "lora", "alone"),
  Arm("Queryable, each alone", "queryable", "alone"),
  Arm("Queryable, atoms frozen after the first", "queryable", later=("atoms",)),
)


def unit_count(points: list[dict]) -> int:
  """The number of units of work."""
  return len(ARMS) * len({point["data.task"] for point in points})


def run(bench: resumable.Bench, points: list[dict]) -> dict[str, list[dict]]:
  """The rows of all units: 'runs', one per training run, and 'errors' of the final runs."""
  rows = {"runs": [], "errors": []}
  for arm in ARMS:
    for config, rates in study.expand(bench.config, points):
      name = f"{config.data.task}, {arm.name}"
      unit = bench.once(name, lambda c=config, r=rates, a=arm: learn(bench, c, a, r))
      for kind, unit_rows in unit.items():
        rows[kind] += unit_rows
  return rows


def order_of(task: str, seed: int) -> np.ndarray:
  """The order int [T] in which a seed meets the parts."""
  count = len(resumable.part_names(task))
  return np.random.default_rng([seed, count]).permutation(count)


def learn(bench: resumable.Bench, config: ml_collections.ConfigDict, arm: Arm, rates) -> dict:
  """The rows of one arm: search and final runs, and the final runs' errors."""
  task = config.data.task
  config = config.copy_and_resolve_references()
  config.adapter.name = ADAPTERS[task][arm.family]
  names, base = resumable.part_names(task), bench.unadapted(config)
  label = {"task": task, "arm": arm.name}
  errors = []

  def train(runs):
    validation, test, trained = _errors(bench, config, arm, runs)
    # On each part right after its training: a stream has no other parts at that time.
    learned = validation[:, -1] if arm.order == "joint" else _diagonal(validation)
    errors.clear()  # of the search
    for (seed, _), matrix in zip(runs, test, strict=True):
      order = order_of(task, seed)
      errors.extend(
        {
          **label,
          "seed": seed,
          "after": int(after),
          "place": int(place),
          "part": names[order[place]],
          "mse": float(matrix[after, place]),
          "base_mse": float(base[order[place]]),
        }
        for after, place in np.ndindex(matrix.shape)
        if arm.order != "alone" or after == place
      )
    return [
      {
        **label,
        "seed": seed,
        "learning_rate": rate,
        "validation_mse": float(learned[index].mean()),
        "validation_mse_at_end": float(validation[index, -1].mean()),
        "trained_first": trained[0],
        "trained_later": trained[-1],
      }
      for index, (seed, rate) in enumerate(runs)
    ]

  rows = resumable.search_and_final(config, rates, train)
  return {"runs": rows, "errors": errors}


def _errors(bench, config, arm: Arm, runs) -> tuple[np.ndarray, np.ndarray, list[int]]:
  """Validation and test errors [R, stages, T], tasks in the order of each run's seed; and the
  number of parameters that each stage trains."""
  task, seeds = config.data.task, resumable.seeds_of(runs)
  orders = {seed: order_of(task, seed) for seed in seeds}
  count = len(resumable.part_names(task))
  errors, trained = {"validation": [], "test": []}, []
  states = None
  for stage in range(1 if arm.order == "joint" else count):
    steps = config.stream.steps * (count if arm.order == "joint" else 1)
    program = bench.program(config, steps, arm.later if stage else arm.first)
    if states is None or arm.order == "alone":
      states, frozen = bench.init(config, program, runs)
    else:
      states = program.start(states.params, resumable.rates_of(runs))
    trained.append(optimizer.count_trained(states.params, program.optimizer.frozen) // len(runs))
    wanted = {seed: None if arm.order == "joint" else (orders[seed][stage],) for seed in seeds}
    data = bench.data(config, program, wanted)
    states = bench.train(program, states, frozen, data, runs)
    for split, rows in errors.items():
      matrix = bench.errors(config, program, states, frozen, data, runs, split)
      rows.append([row[orders[seed]] for row, (seed, _) in zip(matrix, runs, strict=True)])
  validation, test = (np.swapaxes(np.array(rows), 0, 1) for rows in errors.values())
  return validation, test, trained


def _diagonal(matrices: np.ndarray) -> np.ndarray:
  return np.diagonal(matrices, axis1=1, axis2=2)
