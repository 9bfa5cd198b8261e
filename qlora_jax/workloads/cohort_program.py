"""Trials of one shape as one compiled program: `vmap` over seeds x learning rates.

A cohort has R trials that share model, adapter and optimizer and differ in seed and learning rate.
Its state has a leading axis of trials. The frozen base has none, so that its product stays one
large matrix product over all trials. With several devices the trials are sharded over the mesh, and
no step communicates.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.adapters import rerouting, statistics
from qlora_jax.models import mlp
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.training import step as step_lib
from qlora_jax.typing import Array, PyTree
from qlora_jax.workloads import routing_gain

# For functions that run a few times per cohort: without the backend's optimizations they compile in
# a third of the time.
_ONCE = {"xla_backend_optimization_level": 0}
EVAL_ROWS = 1024  # rows a compiled evaluation sees at once; splits are padded to a multiple


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of a cohort; hashable, so that cohorts of one shape share them.

  Attributes:
    model: the backbone with its adapter.
    optimizer: its settings.
    devices: devices that the trials are sharded over.
  """

  model: mlp.MLP
  optimizer: optimizer_lib.OptimizerConfig
  devices: int = 1

  @functools.cached_property
  def _mesh(self) -> jax.sharding.Mesh:
    return jax.make_mesh(
      (self.devices,),
      ("runs",),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[: self.devices],
    )

  def put(self, tree: PyTree, sharded: bool = True) -> PyTree:
    """Places a tree on the mesh: leading axis over the trials, or replicated."""
    return jax.device_put(tree, NamedSharding(self._mesh, P("runs") if sharded else P()))

  @functools.cached_property
  def _tx(self):
    return optimizer_lib.make(self.optimizer)

  def init(
    self, base: PyTree, seeds: np.ndarray, learning_rates: np.ndarray
  ) -> tuple[step_lib.TrainState, step_lib.Frozen]:
    """Draws R trials over one base; trials of one seed start equal at every learning rate."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    rates = jnp.asarray(learning_rates, jnp.float32)
    states, factors = self._init(base, keys, rates)
    return self.put(states), self.put(step_lib.Frozen(base, factors), sharded=False)

  @functools.cached_property
  def _init(self):
    example = step_lib.Batch(
      jnp.zeros((1, self.model.config.inputs)),
      jnp.zeros((1,)),
      jnp.zeros((1, max(self.model.adapter.instruction_dim, 1))),
    )

    def one(base, key, rate):
      params, frozen = step_lib.init_params(self.model, base, key, example)
      state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, self._tx.init(params), rate)
      return state, frozen.factors

    def all_trials(base, keys, rates):
      states, factors = jax.vmap(one, in_axes=(None, 0, 0))(base, keys, rates)
      # Factors are functions of the base alone: one copy serves every trial.
      return states, jax.tree.map(lambda leaf: leaf[0], factors)

    return jax.jit(all_trials, compiler_options=_ONCE)

  def start(self, params: PyTree, learning_rates: np.ndarray) -> step_lib.TrainState:
    """The state before the first step of R trials that start from given weights [R, ..].

    For a trial that continues on another task: optimizer and schedule start from their beginning.
    The weights are copied, because `train` donates its state.
    """
    rates = jnp.asarray(learning_rates, jnp.float32)
    return self.put(self._start(params, rates))

  @functools.cached_property
  def _start(self):
    def one(params, rate):
      return step_lib.TrainState(jnp.zeros((), jnp.int32), params, self._tx.init(params), rate)

    return jax.jit(jax.vmap(one))

  @functools.cached_property
  def train(self):
    """Steps of all trials: (states, frozen, batches, seed_row) -> (states, metrics).

    `batches` [seeds, K, B, ..] has K steps; `seed_row` [R] is the place of each trial's seed.
    """

    def train(states, frozen, batches, seed_row):
      def one(state, row):
        trial_batches = jax.tree.map(lambda leaf: leaf[row], batches)
        return step_lib.train_steps(state, frozen, trial_batches, self.model, self._tx)

      return jax.vmap(one)(states, seed_row)

    return jax.jit(train, donate_argnums=0)

  @functools.cached_property
  def predict(self):
    """Predictions [R, rows] of all trials: (states, frozen, batch, seed_row) -> array.

    `batch` [S, rows, ..]; `seed_row` [R] is the row of S that each trial reads.
    """

    def predict(states, frozen, batch, seed_row):
      def one(params, row):
        trial_batches = jax.tree.map(lambda leaf: leaf[row], batch)
        variables = step_lib.variables(self.model, params, frozen)
        return self.model.apply(variables, trial_batches.features, trial_batches.instruction).values

      return jax.vmap(one)(states.params, seed_row)

    return jax.jit(predict)

  @functools.cached_property
  def route(self):
    """Routing statistics of all trials: (states, frozen, batch, group, num_groups) -> tree [R, ..].

    `batch` [rows, ..]; `group` [rows] is the target of each row, below `num_groups`.
    """

    def route(states, frozen, batch, group, num_groups):
      def one(params):
        variables = step_lib.variables(self.model, params, frozen)
        routing = self.model.apply(variables, batch.features, batch.instruction).routing
        result = {}
        if routing.weights is not None:
          result["weights"] = routing.weights[:, :, : statistics.NORM_TOKENS]
          result["routing"] = statistics.routing_statistics(routing.weights)
          result["shares"] = statistics.share_by_group(routing.weights, group, num_groups)
        return result

      return jax.vmap(lambda state: one(state.params))(states)

    return jax.jit(route, static_argnames="num_groups", compiler_options=_ONCE)

  def update_norms(
    self, states: step_lib.TrainState, weights: np.ndarray | None
  ) -> list[dict[str, float] | None]:
    """`statistics.update_norms` of each trial, given the routing weights [R, N, I, *batch, M]."""
    params = jax.device_get(states.params)
    runs = len(states.step)
    return [
      statistics.update_norms(
        self.model.adapter,
        jax.tree.map(lambda leaf, run=run: leaf[run], params),
        None if weights is None else weights[run],
        mlp.MAPS,
      )
      for run in range(runs)
    ]

  @functools.cached_property
  def _routing_gain(self):
    def one_trial(params, initial, row, frozen, batches, other):
      batch = jax.tree.map(lambda leaf: leaf[row], batches)

      def loss(output):
        return jnp.sum(jnp.square(output.values - batch.targets))

      rows = jnp.ones_like(batch.targets)
      trained, drawn = (step_lib.variables(self.model, tree, frozen) for tree in (params, initial))
      inputs = (batch.features, batch.instruction)
      probed = routing_gain.probe(
        self.model, trained, drawn, loss, other, rows, float(len(rows)), *inputs
      )
      mixtures = routing_gain.one_mixture(self.model, trained, loss, probed.mean_weights, *inputs)
      return probed, mixtures, rerouting.movement(initial, params)

    return jax.jit(jax.vmap(one_trial, in_axes=(0, 0, 0, None, None, None)), compiler_options=_ONCE)

  def routing_gain(
    self,
    params: PyTree,
    initial: PyTree,
    frozen: step_lib.Frozen,
    batches: step_lib.Batch,
    seed_row: Array,
  ) -> list[dict[str, float]]:
    """`routing_gain.COLUMNS` of each of R trials, in mean squared error.

    Args:
      params, initial: the trained trees [R, ..] now and before the first step.
      batches: rows [S, n, ..] with the targets to measure the error by; seed_row: which of the S
        each trial has.
    """
    other = routing_gain.other_rows(batches.targets.shape[1])
    probed, mixtures, moved = jax.device_get(
      self._routing_gain(params, initial, seed_row, frozen, batches, other)
    )
    return [
      routing_gain.columns(
        *jax.tree.map(lambda leaf, run=run: leaf[run], (probed, *mixtures, moved))
      )
      for run in range(len(probed.trained))
    ]


@functools.lru_cache(maxsize=64)
def program(model: mlp.MLP, optimizer: optimizer_lib.OptimizerConfig, devices: int = 1) -> Program:
  """The program of a shape, compiled once per process."""
  return Program(model, optimizer, devices)


def predict_all(
  prog: Program,
  states: step_lib.TrainState,
  frozen: step_lib.Frozen,
  batch: step_lib.Batch,
  seed_row: Array,
) -> np.ndarray:
  """Predictions [R, n] over batches [S, n, ..], in compiled pieces of `EVAL_ROWS`."""
  rows = batch.features.shape[1]
  pieces = []
  for start in range(0, rows, EVAL_ROWS):
    piece = [leaf[:, start : start + EVAL_ROWS] for leaf in batch]
    missing = EVAL_ROWS - piece[0].shape[1]
    padded = [np.pad(leaf, [(0, 0), (0, missing), *[(0, 0)] * (leaf.ndim - 2)]) for leaf in piece]
    values = prog.predict(states, frozen, step_lib.Batch(*padded), seed_row)
    pieces.append(np.asarray(values)[:, : EVAL_ROWS - missing])
  return np.concatenate(pieces, axis=1)
