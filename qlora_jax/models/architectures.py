"""Shapes of published models, in the form of their `config.json`, for plans without weights.

Llama 3.x: arXiv 2407.21783, table 3; Llama 3.2 3B: its model card. Qwen3: arXiv 2505.09388, table
1. Gemma 2: arXiv 2408.00118, table 1. Gemma 3: arXiv 2503.19786. A test compares each parameter
count with the published one.
"""

from typing import Any

from qlora_jax import errors


def _llama(width, hidden, layers, heads) -> dict[str, Any]:
  return {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": width,
    "intermediate_size": hidden,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
  }


def _qwen3(width, hidden, layers, heads) -> dict[str, Any]:
  return {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": width,
    "intermediate_size": hidden,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
  }


PUBLISHED: dict[str, dict[str, Any]] = {
  "llama3.2-3b": {
    **_llama(3072, 8192, 28, 24),
    "head_dim": 128,
    "tie_word_embeddings": True,
    "rope_scaling": {**_llama(0, 0, 0, 0)["rope_scaling"], "factor": 32.0},
  },
  "llama3-8b": _llama(4096, 14_336, 32, 32),
  "llama3-70b": _llama(8192, 28_672, 80, 64),
  "llama3-405b": _llama(16_384, 53_248, 126, 128),
  "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
  "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
  "gemma2-27b": {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "hidden_size": 4608,
    "intermediate_size": 36_864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 144,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
  },
  "gemma3-27b": {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
    "query_pre_attn_scalar": 168,
    "hidden_activation": "gelu_pytorch_tanh",
  },
}


def config(name: str) -> dict[str, Any]:
  """The `config.json` of a published model.

  Raises:
    UserError: the name is unknown; the message lists the known names.
  """
  if name not in PUBLISHED:
    raise errors.UserError(
      f"model.architecture: {name!r} is unknown; use one of {', '.join(PUBLISHED)}, or give"
      " model.weights"
    )
  return PUBLISHED[name]
