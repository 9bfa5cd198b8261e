"""From a language config to checked settings: every mistake is reported before weights are read."""

import dataclasses
import math

import jax
import ml_collections

from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import factory, sizing
from qlora_jax.instructions import encoders
from qlora_jax.models import architectures, decoder, families
from qlora_jax.training import checkpoint
from qlora_jax.training import optimizer as optimizer_lib
from qlora_jax.weights import source, sources

_COUNTS = {
  "data": ("length",),
  "eval": ("every", "validation", "examples", "max_tokens", "batch_size"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config describes, all of it checked.

  Attributes:
    source: the opened weights, None where only shapes were asked for.
    model: decoder with its sized adapter; optimizer: of the run.
    trainable_params: count of the trained tree; micro_batches: parts of a batch, one at a time.
  """

  source: source.Source | None
  model: decoder.Decoder
  optimizer: optimizer_lib.OptimizerConfig
  trainable_params: int
  micro_batches: int

  @property
  def adapter(self) -> adapter_config.AdapterConfig:
    return self.model.adapter


def resolve(config: ml_collections.ConfigDict, abstract: bool = False) -> Settings:
  """Validates a config, opens the weights and sizes the adapter.

  Args:
    config: of kind `language`.
    abstract: whether `model.architecture` is enough where `model.weights` is not given.

  Raises:
    errors.UserError: one line that names the first field that is wrong.
  """
  optimizer = dict(config.optimizer)
  rate, parts = optimizer.pop("learning_rate"), optimizer.pop("micro_batches")
  if rate is not None and not 0 < rate < math.inf:  # None: `factory.learning_rate`
    raise errors.UserError(f"optimizer.learning_rate: {rate} is not a finite number above 0")
  if parts < 1 or optimizer["batch_size"] % parts:
    raise errors.UserError(
      f"optimizer.micro_batches: {parts} does not divide batch_size = {optimizer['batch_size']}"
    )
  if config.instruction.encoder not in encoders.NAMES:
    raise errors.UserError(
      f"instruction.encoder: {config.instruction.encoder!r} is unknown; use one of"
      f" {', '.join(encoders.NAMES)}"
    )
  for section, names in _COUNTS.items():
    for name in names:
      if config[section][name] < 1:
        raise errors.UserError(f"{section}.{name}: {config[section][name]} is not at least 1")
  for name in ("routing", "routing_every"):
    if config.eval[name] < 0:
      raise errors.UserError(f"eval.{name}: {config.eval[name]} is below 0; use 0 for none")
  if config.eval.routing_every % config.eval.every:
    raise errors.UserError(
      f"eval.routing_every: {config.eval.routing_every} is not a multiple of eval.every ="
      f" {config.eval.every}"
    )
  template = config.data.get("template")
  if template is not None and "{prompt}" not in template:
    raise errors.UserError(f"data.template: {template!r} has no {{prompt}}, where the prompt goes")
  checkpoint.check_config(config)
  for field in ("search_seeds", "final_seeds"):
    if not config.protocol[field]:
      raise errors.UserError(f"protocol.{field}: the list is empty; give at least one seed")
  opened, shape = _shape(config.model, abstract)
  if config.data.length > shape.max_length:
    raise errors.UserError(
      f"data.length: {config.data.length} is more than the model's context of {shape.max_length}"
    )
  overrides = dict(config.adapter)
  name, budget = overrides.pop("name"), overrides.pop("budget")
  base = decoder.abstract(shape)["base"]
  network = shape.network(sum(leaf.size for leaf in jax.tree.leaves(base)))
  adapter = factory.make(
    name, overrides, network, budget=budget, instruction_dim=config.instruction.dim
  )
  return Settings(
    opened,
    decoder.Decoder(shape, adapter),
    optimizer_lib.OptimizerConfig(**optimizer),
    sizing.count(adapter, network),
    parts,
  )


def _shape(
  model: ml_collections.ConfigDict, abstract: bool
) -> tuple[source.Source | None, decoder.DecoderConfig]:
  """The opened weights, and the decoder that they or the named architecture describe."""
  fields = {key: value for key, value in model.items() if value is not None}
  weights, name = fields.pop("weights", None), fields.pop("architecture", None)
  if "adapted" in fields:
    fields["adapted"] = tuple(fields["adapted"])
  named = None if name is None else families.config_from_hf(architectures.config(name), **fields)
  if weights is None:
    if named is None or not abstract:
      raise errors.UserError(
        "model.weights: missing; give a Hugging Face folder, a .gguf file or a built-in name"
      )
    return None, named
  opened = sources.open_source(weights)
  shape = families.config_from_hf(opened.config, **fields)
  for field in ("layers", "width", "hidden", "heads", "groups"):
    if named is not None and getattr(shape, field) != getattr(named, field):
      raise errors.UserError(
        f"model.weights: {weights} is no {name}: its {field} is {getattr(shape, field)}, not"
        f" {getattr(named, field)}; give the weights of {name} or another model.architecture"
      )
  return opened, shape
