"""Converts GGUF metadata, names and layouts to Hugging Face config, names and layouts.

The changes that llama.cpp's converter makes per architecture are undone. The rows of Llama's query
and key maps return from interleaved to half-split rotary order. The 1 that was added to Gemma's
norm scales is subtracted. GPT-2's linear maps return to `[in, out]`. Llama 3's rotary factors
become a `rope_scaling` entry.

Reference: https://github.com/ggml-org/llama.cpp, `convert_hf_to_gguf.py`.
"""

import math
import re
from typing import Any

import numpy as np

from qlora_jax import errors
from qlora_jax.weights import gguf_header

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
ROPE_FACTORS = "rope_freqs.weight"  # converted to a config entry

_CLASSES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3": "Gemma3ForCausalLM",
  "gpt2": "GPT2LMHeadModel",
}
_TOP = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_BLOCK = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {
  **_BLOCK,
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_TOP = {
  "token_embd": "transformer.wte",
  "position_embd": "transformer.wpe",
  "output_norm": "transformer.ln_f",
  "output": "lm_head",
}
_GPT2_BLOCK = {
  "attn_norm": "ln_1",
  "attn_qkv": "attn.c_attn",
  "attn_output": "attn.c_proj",
  "ffn_norm": "ln_2",
  "ffn_up": "mlp.c_fc",
  "ffn_down": "mlp.c_proj",
}
_GPT2_LINEAR = re.compile(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight")
_ROTARY = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def architecture(header: gguf_header.Header) -> str:
  """One of `ARCHITECTURES`. Raises UserError for others, for experts and for a split file."""
  name = header.get("general.architecture", str)
  if name not in ARCHITECTURES:
    raise errors.UserError(
      f"{header.path}: the architecture {name!r} is not supported; supported:"
      f" {', '.join(ARCHITECTURES)}"
    )
  if header.get(f"{name}.expert_count", int, 0) > 0:
    raise errors.UserError(f"{header.path}: mixtures of experts are not supported")
  if (parts := header.get("split.count", int, 1)) > 1:
    raise errors.UserError(
      f"{header.path}: is one of {parts} parts; join them with `llama-gguf-split --merge`"
    )
  return name


def names(header: gguf_header.Header) -> dict[str, str]:
  """Hugging Face name -> GGUF name. Raises UserError for unknown tensors."""
  kind = architecture(header)
  top = _GPT2_TOP if kind == "gpt2" else _TOP
  block = {"gpt2": _GPT2_BLOCK, "gemma2": _GEMMA_BLOCK, "gemma3": _GEMMA_BLOCK}.get(kind, _BLOCK)
  layers = "transformer.h" if kind == "gpt2" else "model.layers"
  gguf_names, unknown_tensors = {}, []
  for name in header.tensors:
    if name == ROPE_FACTORS:
      continue
    stem, _, suffix = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in block and suffix in ("weight", "bias"):
      gguf_names[f"{layers}.{match[1]}.{block[match[2]]}.{suffix}"] = name
    elif stem in top and suffix in ("weight", "bias"):
      gguf_names[f"{top[stem]}.{suffix}"] = name
    else:
      unknown_tensors.append(name)
  if unknown_tensors:
    raise errors.UserError(
      f"{header.path}: {len(unknown_tensors)} tensors are unknown in {kind}, such as"
      f" {unknown_tensors[0]}"
    )
  return gguf_names


def transposed(kind: str, name: str) -> bool:
  """Whether the Hugging Face layout is the transpose; only for GPT-2's linear maps."""
  return kind == "gpt2" and _GPT2_LINEAR.fullmatch(name) is not None


def restore(kind: str, config: dict[str, Any], name: str, value: np.ndarray) -> np.ndarray:
  """Undoes the converter's changes to one tensor.

  Args:
    kind: the architecture.
    config: the Hugging Face config.
    name: GGUF name of the tensor.
    value: the tensor in the GGUF layout, dequantised.
  """
  if transposed(kind, name):
    return value.T
  if kind == "llama" and (match := _ROTARY.fullmatch(name)):
    heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    # Row order within a head: GGUF stores (pair, half), Hugging Face (half, pair).
    paired = value.reshape(heads, -1, 2, *value.shape[1:])
    return paired.swapaxes(1, 2).reshape(value.shape)
  if kind.startswith("gemma") and name.endswith("norm.weight"):
    return value - np.ones((), value.dtype)
  return value


def config(header: gguf_header.Header) -> dict[str, Any]:
  """The config in the form of Hugging Face's config.json.

  Raises:
    UserError: a key is missing or has another type, or the rotary scaling is not supported.
  """
  kind = architecture(header)

  def number(key: str, value_type: type = int, default: Any = None) -> Any:
    return header.get(f"{kind}.{key}", value_type, default)

  if "token_embd.weight" not in header.tensors:
    raise errors.UserError(f"{header.path}: has no tensor token_embd.weight")
  common = {
    "architectures": [_CLASSES[kind]],
    "model_type": {"gemma3": "gemma3_text"}.get(kind, kind),
    "vocab_size": header.tensors["token_embd.weight"].shape[0],
    "tie_word_embeddings": "output.weight" not in header.tensors,
  }
  for token in ("bos", "eos"):
    key = f"tokenizer.ggml.{token}_token_id"
    if key in header.metadata:
      common[f"{token}_token_id"] = header.get(key, int)
  heads, width = number("attention.head_count"), number("embedding_length")
  if kind == "gpt2":
    return common | {
      "n_embd": width,
      "n_layer": number("block_count"),
      "n_head": heads,
      "n_positions": number("context_length"),
      "n_inner": number("feed_forward_length"),
      "layer_norm_epsilon": _epsilon(number("attention.layer_norm_epsilon", float)),
      "activation_function": "gelu_new",
    }
  head_dim = number(
    "attention.key_length", int, number("rope.dimension_count", int, width // heads)
  )
  decoder = common | {
    "hidden_size": width,
    "intermediate_size": number("feed_forward_length"),
    "num_hidden_layers": number("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": number("attention.head_count_kv", int, heads),
    "head_dim": head_dim,
    "max_position_embeddings": number("context_length"),
    "rms_norm_eps": _epsilon(number("attention.layer_norm_rms_epsilon", float)),
    "rope_theta": number("rope.freq_base", float, 1e6 if kind == "gemma3" else 1e4),
    "rope_scaling": _rope_scaling(header, kind, head_dim),
    "attention_bias": "blk.0.attn_q.bias" in header.tensors,
  }
  if not kind.startswith("gemma"):
    return decoder | {"hidden_act": "silu"}
  return decoder | _gemma(header, kind, decoder)


def _gemma(header: gguf_header.Header, kind: str, decoder: dict[str, Any]) -> dict[str, Any]:
  layers, head_dim = decoder["num_hidden_layers"], decoder["head_dim"]
  # The file does not contain the scale of queries. It is the head dimension; in the largest model
  # of a family it is the width per head. As in llama.cpp, the depth identifies the largest model.
  largest_depth = {"gemma2": 46, "gemma3": 62}[kind]
  scale = (
    decoder["hidden_size"] // decoder["num_attention_heads"]
    if layers == largest_depth
    else head_dim
  )
  period = {"gemma2": 2, "gemma3": 6}[kind]
  gemma_config = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": scale,
    "sliding_window": header.get(f"{kind}.attention.sliding_window", int),
    "layer_types": [
      "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
      for layer in range(layers)
    ],
  }
  if kind == "gemma2":
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
      gemma_config[key] = header.get(f"gemma2.{key}", float)
  else:
    gemma_config["rope_local_base_freq"] = header.get("gemma3.rope.freq_base_swa", float, 1e4)
  return gemma_config


def _rope_scaling(header: gguf_header.Header, kind: str, head_dim: int) -> dict[str, Any] | None:
  if ROPE_FACTORS in header.tensors:
    return _llama3_scaling(header, kind, head_dim)
  scaling = header.get(f"{kind}.rope.scaling.type", str, "none")
  if scaling == "none":
    return None
  if scaling not in ("linear", "yarn"):
    raise errors.UserError(f"{header.path}: the rotary scaling {scaling!r} is not supported")
  rope_config: dict[str, Any] = {
    "rope_type": scaling,
    "factor": header.get(f"{kind}.rope.scaling.factor", float),
  }
  if scaling == "yarn":
    rope_config["original_max_position_embeddings"] = header.get(
      f"{kind}.rope.scaling.original_context_length", int
    )
  return rope_config


def _llama3_scaling(header: gguf_header.Header, kind: str, head_dim: int) -> dict[str, Any]:
  """Llama 3.1's scaling, recovered from the factors that the converter stored.

  With l the wavelength of a frequency, s the factor and o = 8192 the original context, the stored
  factor is 1 for l < o / 4, s for l > o, and otherwise 1 / ((1 - m) / s + m) with
  m = (o / l - 1) / 3.
  """
  tensor = header.tensors[ROPE_FACTORS]
  if tensor.type.name != "F32":
    raise errors.UserError(f"{header.path}: {ROPE_FACTORS} are stored as {tensor.type.name}")
  stored = np.memmap(header.path, np.float32, "r", tensor.offset, tensor.shape)
  base, factor, original = header.get(f"{kind}.rope.freq_base", float), float(stored.max()), 8192
  wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = (original / wavelengths - 1) / 3
  expected = 1 / np.clip((1 - smooth) / factor + smooth, 1 / factor, 1)
  if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
    raise errors.UserError(f"{header.path}: {ROPE_FACTORS} are not Llama 3's rotary factors")
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": original,
  }


def _epsilon(stored: float) -> float:
  """The shortest decimal of a float32: 1e-5 is stored as 9.99999974e-06."""
  return float(np.format_float_positional(np.float32(stored), unique=True))
