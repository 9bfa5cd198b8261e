"""Every family against `transformers` on random weights, float32, through a saved checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from qlora_jax import errors
from qlora_jax.adapters import config as adapter_config
from qlora_jax.models import decoder, families, generation
from qlora_jax.weights import hf_layout, sources

SIZES = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "vocab_size": 96,
  "max_position_embeddings": 256,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
  "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = SIZES | {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 16}
FAMILIES = {
  "llama": ("Llama", SIZES),
  "llama with biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
  "llama 3.1": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
  "llama 3.2, tied": (
    "Llama",
    SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
  ),
  "llama yarn": ("Llama", SIZES | {"rope_parameters": YARN | {"rope_theta": 1e4}}),
  "mistral": ("Mistral", SIZES | {"sliding_window": 12, "head_dim": 8}),
  "mistral without window": ("Mistral", SIZES | {"sliding_window": None}),
  "qwen2": ("Qwen2", SIZES),
  "qwen2 with windows": (
    "Qwen2",
    SIZES | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
  ),
  "qwen3": ("Qwen3", SIZES | {"head_dim": 16}),
  "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}),
  "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 8}),
  "gpt2": (
    "GPT2",
    {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 96},
  ),
}
PROMPTS = [[5, 17, 3, 60, 44, 8, 9], list(range(20, 60)), [1]]


def reference(name):
  family, changes = FAMILIES[name]
  config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
  config = getattr(transformers, config_name)(**changes)
  config._attn_implementation = "eager"  # the implementation with Gemma's soft caps
  cls = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
  torch.manual_seed(0)
  model = getattr(transformers, cls)(config)
  with torch.no_grad():
    for parameter in model.parameters():  # norms and biases too, so that a swap shows
      parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
  return model.eval()


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tmp_path_factory):
  """The reference model, and our config and base, read from the reference's checkpoint."""
  model = reference(request.param)
  folder = tmp_path_factory.mktemp("model")
  model.save_pretrained(folder, max_shard_size="40KB")  # several files and their index
  source = sources.open_source(folder)
  config = families.config_from_hf(source.config, layers_per_block=2)
  return model, config, hf_layout.load_base(source, config)


def logits_of(config, base, tokens, **options):
  model = decoder.Decoder(config, adapter_config.AdapterConfig(family="none"))
  scores, _ = model.apply({"base": base}, np.asarray(tokens, np.int32), method="score", **options)
  return np.asarray(scores)


def test_logits_equal_those_of_transformers(family):
  model, config, base = family
  tokens = np.random.default_rng(0).integers(1, 96, (2, 50))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  actual = logits_of(config, base, tokens)
  assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
  assert expected.std() > 0.1  # not a constant


def test_64_greedy_tokens_equal_those_of_transformers(family):
  model, config, base = family
  decoded = decoder.Decoder(config, adapter_config.AdapterConfig(family="none"))
  sampling = generation.SamplingConfig(max_tokens=64)
  actual = generation.generate(decoded, {"base": base}, PROMPTS, sampling=sampling)
  model.generation_config.eos_token_id = None
  for prompt, tokens in zip(PROMPTS, actual, strict=True):
    ids = torch.tensor([prompt])
    expected = model.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    assert tokens == expected[0, len(prompt) :].tolist()


def test_the_old_spelling_of_rotary_settings_is_read():
  new = families.config_from_hf({"model_type": "llama", **SIZES, "rope_parameters": LLAMA3})
  scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
  old = families.config_from_hf(
    {"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": scaling}
  )
  assert new == old
  gemma = {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7}
  old = families.config_from_hf(
    gemma | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
  )
  new = families.config_from_hf(transformers.Gemma3TextConfig(**gemma).to_dict())
  assert dataclasses.replace(old, max_length=0) == dataclasses.replace(new, max_length=0)
  assert old.layer_windows == (12,) * 5 + (0, 12)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "mamba"}, "model_type 'mamba'.*llama"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_act": "mish"}, "activation 'mish'.*silu"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'.*llama3"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1"),
  ],
)
def test_an_unknown_config_is_one_line(changes, named):
  with pytest.raises(errors.UserError, match=named):
    families.config_from_hf({"model_type": "llama", **SIZES} | changes)


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"layers_per_block": 3}, "layers_per_block: 3 does not divide.*1, 2, 4"),
    ({"adapted": ("q", "w")}, "no map 'w'.*q, k, v, o, gate, up, down"),
    ({"adapted": ()}, "adapted: empty"),
    ({"remat": "some"}, "remat: 'some'.*full"),
    ({"dtype": "float16"}, "dtype: 'float16'.*bfloat16"),
  ],
)
def test_a_wrong_field_is_one_line(fields, named):
  with pytest.raises(errors.UserError, match=named):
    families.config_from_hf({"model_type": "llama", **SIZES}, **fields)


class Changed:
  """A source with tensors removed, added or reshaped."""

  def __init__(self, source, changes):
    self.source, self.changes = source, changes
    self.name, self.config = source.name, source.config

  def names(self):
    remaining = [name for name in self.source.names() if self.changes.get(name, "") is not None]
    return [*remaining, *(name for name in self.changes if name.startswith("extra"))]

  def shape(self, name):
    return self.changes.get(name) or self.source.shape(name)


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path):
  reference("llama").save_pretrained(tmp_path)
  source = sources.open_source(tmp_path)
  config = families.config_from_hf(source.config)
  changes = {
    "model.layers.1.mlp.up_proj.weight": None,
    "extra.weight": (3,),
    "model.norm.weight": (31,),
  }
  with pytest.raises(errors.UserError) as caught:
    hf_layout.load_base(Changed(source, changes), config)
  message = str(caught.value)
  assert "missing tensors: model.layers.1.mlp.up_proj.weight;" in message
  assert "unknown tensors: extra.weight;" in message
  assert "model.norm.weight is (31,), not (32,)" in message and "\n" not in message
