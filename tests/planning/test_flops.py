"""Analytic FLOPs against manual counts and the compiler's count for small unrolled models."""

import dataclasses

import jax
import pytest
from jax import numpy as jnp

from qlora_jax.adapters import config as adapter_config
from qlora_jax.adapters import functional
from qlora_jax.models import architectures, decoder, families
from qlora_jax.planning import flops

TINY = decoder.DecoderConfig(
  vocabulary=128, width=64, hidden=256, layers=2, heads=4, groups=2, head_dim=16, unroll=True
)
ROWS, LENGTH = 2, 32


def counted(adapter, **changes):
  """The compiler's forward FLOPs of all tokens, without the head."""
  shape = dataclasses.replace(TINY, **changes)
  model = decoder.Decoder(shape, adapter)
  variables = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    jax.tree.map(
      lambda leaf: leaf.value,
      decoder.abstract(shape, adapter),
      is_leaf=lambda leaf: hasattr(leaf, "names"),
    ),
  )
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  lowered = jax.jit(lambda variables, tokens: model.apply(variables, tokens).hidden).lower(
    variables, tokens
  )
  return lowered.cost_analysis()["flops"]


def test_forward_flops_equal_the_compilers_count(monkeypatch):
  # On a CPU C is applied in wide products with many zeros (`functional.apply_operator`).
  monkeypatch.setattr(functional, "_apply_expanded", functional._apply_batched)
  tokens, none = ROWS * LENGTH, adapter_config.AdapterConfig(family="none")
  lora = adapter_config.AdapterConfig(family="lora", rank=16)
  routed = adapter_config.AdapterConfig(rank=16, atoms=64, query_dim=16)
  base = counted(none)
  work = flops.step(TINY, none, ROWS, LENGTH, tokens)
  # The reference attention computes all scores; `seen_keys` counts only visible keys.
  attention = work.attention / 3 * LENGTH / flops.seen_keys(LENGTH)
  assert base == pytest.approx(
    work.base / 2 + attention, rel=0.08
  )  # norms and softmax are not counted
  low_rank = flops.step(TINY, lora, ROWS, LENGTH, tokens).adapter / 3
  assert counted(lora) - base == pytest.approx(low_rank, rel=0.12)  # without the sum with the base
  routing = tokens * flops.routing_forward(TINY, routed)
  assert counted(routed) - counted(lora) == pytest.approx(routing, rel=0.12)


def test_llama3_70b_takes_four_or_six_flops_per_parameter():
  """A frozen base takes 4 FLOPs per parameter and token (no gradient of W), a trained one 6."""
  shape = families.config_from_hf(architectures.config("llama3-70b"), remat="full")
  tokens = 4096
  parameters = 70_553_706_496 - 2 * shape.vocabulary * shape.width - 161 * shape.width
  work = flops.step(shape, adapter_config.AdapterConfig(family="lora", rank=16), 1, tokens, tokens)
  full = flops.step(shape, adapter_config.AdapterConfig(family="full"), 1, tokens, tokens)
  assert work.base == pytest.approx(4 * parameters * tokens, rel=1e-6)
  assert full.base == pytest.approx(6 * parameters * tokens, rel=1e-6)
  factors = 16 * 80 * sum(sum(widths) for widths in shape.map_shapes.values())
  assert work.adapter == 6.0 * factors * tokens
  assert work.hardware > work.model + work.base / 2


def test_a_window_counts_the_keys_inside_it():
  visible_keys = [min(position + 1, 4) for position in range(10)]
  assert flops.seen_keys(10, 4) == pytest.approx(sum(visible_keys) / 10)
  assert flops.seen_keys(10) == 5.5


def test_the_target_adds_less_than_a_thousandth():
  shape = families.config_from_hf(architectures.config("llama3-70b"), remat="full")
  adapter = adapter_config.AdapterConfig(rank=16, atoms=64, top_k=4)
  work = flops.step(shape, adapter, 64, 4096, 64 * 4096)
  assert 0 < work.routing < 1e-3 * work.model
