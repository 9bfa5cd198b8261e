"""From a regression config to checked settings: every mistake is reported before compiling."""

import dataclasses
import math

import jax
import ml_collections
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import factory, sizing
from qlora_jax.data import pipeline
from qlora_jax.instructions import encoders
from qlora_jax.models import mlp
from qlora_jax.training import checkpoint
from qlora_jax.training import optimizer as optimizer_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """The hashable records that a config describes.

  Attributes:
    model: the backbone's shape.
    adapter: its rank or atoms sized to the budget.
    optimizer: of a trial.
    trainable_params: count of the trained tree.
  """

  model: mlp.MLPConfig
  adapter: adapter_config.AdapterConfig
  optimizer: optimizer_lib.OptimizerConfig
  trainable_params: int

  @property
  def network(self) -> mlp.MLP:
    return mlp.MLP(self.model, self.adapter)


def resolve(config: ml_collections.ConfigDict) -> Settings:
  """Validates a config and sizes its adapter.

  Raises:
    errors.UserError: one line that names the first field that is wrong.
  """
  model = mlp.MLPConfig(**config.model)
  task = pipeline.describe_task(config.data.task)
  if len(task.feature_names) > model.inputs:
    raise errors.UserError(
      f"model.inputs: {model.inputs} is below the {len(task.feature_names)} features of"
      f" {config.data.task}; use at least that"
    )
  if config.instruction.encoder not in encoders.NAMES:
    raise errors.UserError(
      f"instruction.encoder: {config.instruction.encoder!r} is unknown; use one of"
      f" {', '.join(encoders.NAMES)}"
    )
  _check_pretrain(config.pretrain)
  optimizer = dict(config.optimizer)
  _check_rate("optimizer", optimizer.pop("learning_rate"))
  for field in ("search_seeds", "final_seeds"):
    if not config.protocol[field]:
      raise errors.UserError(f"protocol.{field}: the list is empty; give at least one seed")
  if not 1 <= config.mesh.runs <= jax.device_count():
    raise errors.UserError(
      f"mesh.runs: {config.mesh.runs} is not between 1 and the {jax.device_count()} device(s)"
    )
  if config.eval.every < 1:
    raise errors.UserError(f"eval.every: {config.eval.every} is not at least 1")
  if config.eval.routing_every < 0:
    raise errors.UserError(
      f"eval.routing_every: {config.eval.routing_every} is below 0; use 0 for the end alone"
    )
  checkpoint.check_config(config)
  overrides = dict(config.adapter)
  name, budget = overrides.pop("name"), overrides.pop("budget")
  network = shapes(model)
  adapter = factory.make(
    name, overrides, network, budget=budget, instruction_dim=config.instruction.dim
  )
  return Settings(
    model,
    adapter,
    optimizer_lib.OptimizerConfig(**optimizer),
    sizing.count(adapter, network),
  )


def _check_rate(section: str, rate: float) -> None:
  if not 0 < rate < math.inf:
    raise errors.UserError(f"{section}.learning_rate: {rate} is not a finite number above 0")


def _check_pretrain(pretrain: ml_collections.ConfigDict) -> None:
  """The fields of the frozen network's training: by name, before they reach the optimiser."""
  _check_rate("pretrain", pretrain.learning_rate)
  for field, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
    if pretrain[field] < least:
      raise errors.UserError(f"pretrain.{field}: {pretrain[field]} is not at least {least}")


def shapes(model: mlp.MLPConfig) -> sizing.Network:
  """The shapes that an adapter meets in the MLP."""
  base = jax.eval_shape(lambda: random_base(model, 0))
  return sizing.Network(
    tuple((name, *shape) for name, shape in model.map_shapes.items()),
    model.layers,
    model.blocks,
    model.width,
    sum(leaf.size for leaf in jax.tree.leaves(base)),
  )


def random_base(model: mlp.MLPConfig, seed: int):
  """A base network before it is trained on the source."""
  network = mlp.MLP(model, adapter_config.AdapterConfig(family="none"))
  variables = network.init(jax.random.key(seed), jnp.zeros((1, model.inputs)), None)
  return nn.meta.unbox(variables)["base"]
