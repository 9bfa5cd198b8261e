"""A language trial's trees on its mesh: base, train state, batches and the compiled step.

No array is ever whole on one device unless the mesh has a single device. The base is read into its
shards, the adapter and the optimizer state are drawn in theirs, and each process reads its rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qlora_jax.data.text import packing
from qlora_jax.models import decoder
from qlora_jax.parallel import mesh as mesh_lib
from qlora_jax.parallel import sharding
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.training import step as step_lib
from qlora_jax.typing import PyTree
from qlora_jax.workloads import language_step


@dataclasses.dataclass(frozen=True)
class Shards:
  """A mesh and its rules. Hashable: compiled steps are keyed by it.

  Attributes:
    mesh: of all devices of all processes.
    rules: which axis of a parameter is split over which of the mesh.
  """

  mesh: Mesh
  rules: mesh_lib.Rules = mesh_lib.DEFAULT_RULES

  def use(self):
    """A context in which functions are traced for this mesh."""
    return sharding.use(self.mesh, self.rules)

  @property
  def own_rows(self) -> tuple[int, int]:
    """(index, count): which part of every batch this process reads."""
    return sharding.own_rows(self.mesh)

  @property
  def replicated(self) -> NamedSharding:
    return sharding.replicated(self.mesh)

  def variables(self, model: decoder.Decoder) -> dict[str, PyTree]:
    """Shardings of a model's collections."""
    return sharding.tree(self.mesh, self.rules, decoder.abstract(model.config, model.adapter))

  def trained(self, model: decoder.Decoder) -> PyTree:
    """Shardings of the trained tree; full fine-tuning trains the base."""
    shardings = self.variables(model)
    if model.adapter.trains_base:
      return {**shardings.get("params", {}), "base": shardings["base"]}
    return shardings.get("params", {})

  def state(
    self, model: decoder.Decoder, optimizer: optimizer_lib.OptimizerConfig
  ) -> step_lib.TrainState:
    """Shardings of the train state."""
    abstract = decoder.abstract(model.config, model.adapter)
    collections, trained = nn.meta.unbox(abstract), self.trained(model)
    params = collections.get("params", {})
    if model.adapter.trains_base:
      params = {**params, "base": collections["base"]}
    tx = optimizer_lib.make(optimizer)
    opt_state = sharding.optimizer(tx, jax.eval_shape(tx.init, params), trained, self.mesh)
    return step_lib.TrainState(self.replicated, trained, opt_state, self.replicated)

  def draw(
    self,
    model: decoder.Decoder,
    base: PyTree,
    optimizer: optimizer_lib.OptimizerConfig,
    learning_rate: float,
    seed: int,
  ) -> tuple[step_lib.TrainState, step_lib.Frozen]:
    """The first train state of a trial over a base, every leaf drawn in its shards."""

    def make(base, key):
      params, frozen = language_step.init_params(model, base, key)
      state = step_lib.TrainState(
        jnp.zeros((), jnp.int32),
        params,
        optimizer_lib.make(optimizer).init(params),
        jnp.float32(learning_rate),
      )
      return state, frozen.factors

    shardings = (self.state(model, optimizer), self.variables(model).get("frozen", {}))
    with self.use():
      state, factors = jax.jit(make, out_shardings=shardings)(base, jax.random.key(seed))
    return state, step_lib.Frozen(base, factors)

  def batch(
    self, text: packing.TextBatch, table: np.ndarray | None, parts: int = 1
  ) -> language_step.LanguageBatch:
    """The global batch of which `text` has this process's rows."""
    local = mesh_lib.data_shards(self.mesh) // self.own_rows[1]
    batch = language_step.from_text(text, table, parts, local)
    return batch if self.mesh.size == 1 else sharding.place(self.mesh, batch)

  def share(self, text: packing.TextBatch) -> packing.TextBatch:
    """This process's rows of a batch that every process holds completely."""
    index, count = self.own_rows
    rows = len(text.tokens) // count
    answers = np.count_nonzero(text.loss_mask, axis=1)
    local = [leaf[index * rows : (index + 1) * rows] for leaf in text[:6]]
    return packing.TextBatch(*local, answers)


def jitted(model: decoder.Decoder, optimizer: optimizer_lib.OptimizerConfig, shards: Shards) -> Any:
  """The step under `jax.jit`, to be called or lowered inside `shards.use()`."""

  def step(state, frozen, batch):
    return step_lib.train_step(
      state, frozen, batch, model, optimizer_lib.make(optimizer), language_step.gradients
    )

  state = shards.state(model, optimizer)
  return jax.jit(step, donate_argnums=0, out_shardings=(state, shards.replicated))


@functools.lru_cache(maxsize=8)
def update(model: decoder.Decoder, optimizer: optimizer_lib.OptimizerConfig, shards: Shards) -> Any:
  """The compiled step: (state, frozen, batch) -> (state, metrics); the state is donated."""
  compiled = jitted(model, optimizer, shards)

  def run(*arguments):
    with shards.use():
      return compiled(*arguments)

  return run
