"""A fine-tuned model for generation: an adapter folder and its base model."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.data.text import formatting, records
from qlora_jax.instructions import cache, projection
from qlora_jax.models import decoder, families, generation
from qlora_jax.typing import PyTree
from qlora_jax.weights import adapter_file, chat, hf_layout, sources


class FineTuned:
  """Answers prompts with the adapter on or off.

  Args:
    directory: an adapter's folder, written by a run.
    weights: the base model: a built-in name, a folder, a hub id or a .gguf file. None uses the
      name that is stored in the adapter.

  Raises:
    UserError: there is no adapter, or it was trained on another base.
  """

  def __init__(self, directory: str | pathlib.Path, weights: str | None = None):
    tree, metadata = adapter_file.load(directory, None)
    name = weights or metadata["model_name"]
    source = sources.open_source(name)
    adapter_file.load(directory, source.fingerprint, base_name=name)
    self.metadata: dict[str, Any] = metadata
    self.tokenizer = source.tokenizer()
    shape = dict(metadata["model_config"])
    shape["adapted"] = tuple(shape["adapted"])
    config = families.config_from_hf(source.config, **shape)
    self.tokenizer.check_vocab(config.vocabulary)
    fields = dict(metadata["adapter"])
    if "method" in fields:  # the name of `family` in adapters that earlier versions saved
      fields["family"] = fields.pop("method")
    fields["map_ranks"] = tuple(tuple(pair) for pair in fields["map_ranks"])
    self.adapted = decoder.Decoder(config, adapter_config.AdapterConfig(**fields))
    self.base = decoder.Decoder(config, adapter_config.AdapterConfig(family="none"))
    base = hf_layout.load_base(source, config)
    self.variables: PyTree = {
      "params": jax.device_put(tree["params"]),
      "base": base,
      "frozen": jax.device_put(tree.get("frozen", {})),
    }
    projection_arrays = tree.get("projection")
    self.projection = projection_arrays and projection.Projection(**projection_arrays)

  @property
  def uses_instruction(self) -> bool:
    """Whether the router or the input uses the instruction's embedding."""
    return self.adapted.adapter.uses_instruction

  def tokens_of(self, prompt: str, instruction: str = "") -> np.ndarray:
    """The prompt as int32 tokens [n], rendered as in training."""
    example = records.Example(instruction, prompt, ("",), "chat", 0)
    render = formatting.renderer(
      self.tokenizer, self.metadata.get("system"), self.metadata.get("template")
    )
    encoded = formatting.encode_example(
      example,
      self.tokenizer,
      render,
      instruction_in_prompt=self.metadata["instruction"]["in_prompt"],
    )
    return encoded.prompt

  def embedding_of(self, instruction: str) -> np.ndarray | None:
    """The instruction's embedding, float32 [1, E]; None if the adapter uses none.

    Raises:
      UserError: the adapter uses an embedding, and the instruction is empty.
    """
    if not self.uses_instruction:
      return None
    if not instruction.strip():
      raise errors.UserError(
        "--instruction: missing; this adapter needs an instruction, such as"
        " --instruction='Write the first letter of the word.'"
      )
    embedded = cache.embed(
      [instruction], self.metadata["instruction"]["encoder"], cache.default_dir()
    )
    return projection.apply(self.projection, embedded)

  def stream(
    self,
    prompt: str,
    instruction: str = "",
    sampling: generation.SamplingConfig | None = None,
    adapter_on: bool = True,
  ) -> Iterator[str]:
    """Yields the answer in pieces; the concatenated pieces are the whole text.

    Raises:
      UserError: an empty prompt; an empty instruction for an adapter that uses one.
    """
    if not prompt.strip():
      raise errors.UserError("--prompt: empty; give some text")
    model, variables = (self.adapted, self.variables)
    embedding = self.embedding_of(instruction) if adapter_on else None
    if not adapter_on:
      model, variables = self.base, {"base": self.variables["base"]}
    stop_ids, generated, yielded = set(chat.stop_ids(self.tokenizer)), [], ""
    for tokens in generation.stream(
      model, variables, [self.tokens_of(prompt, instruction)], sorted(stop_ids), sampling, embedding
    ):
      if int(tokens[0]) in stop_ids:
        break
      generated.append(int(tokens[0]))
      text = self.tokenizer.decode(generated, skip_special_tokens=True)
      if text.endswith("\ufffd"):
        continue  # incomplete UTF-8 character
      yield text[len(yielded) :]
      yielded = text
    text = self.tokenizer.decode(generated, skip_special_tokens=True)
    if text[len(yielded) :]:
      yield text[len(yielded) :]
