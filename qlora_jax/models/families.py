"""The decoder families: reads a Hugging Face `config.json` as a `DecoderConfig`.

Llama 2 and 3.x, SmolLM2 (a Llama), Mistral, Qwen2 and 2.5, Qwen3, Gemma 2, Gemma 3 (text), GPT-2.
Rotary fields are read in both spellings: `rope_parameters`, and `rope_theta` with `rope_scaling`.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax import errors
from qlora_jax.models import decoder, rope

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2")


def config_from_hf(hf: Mapping[str, Any], **overrides: Any) -> decoder.DecoderConfig:
  """The decoder that `config.json` describes.

  Args:
    hf: content of the file.
    **overrides: fields of `DecoderConfig` that the file does not set, such as `layers_per_block`,
      `adapted`, `dtype`.

  Raises:
    UserError: the family is unknown, a field is missing, or the decoder lacks a feature.
  """
  family = hf.get("model_type")
  if family == "gemma3" and "text_config" in hf:
    hf, family = {"model_type": "gemma3_text", **hf["text_config"]}, "gemma3_text"
  if family not in FAMILIES:
    raise errors.UserError(
      f"config.json: model_type {family!r} is unknown; known are {', '.join(FAMILIES)}"
    )
  fields = _gpt2(hf) if family == "gpt2" else _llama_like(hf, family)
  return decoder.DecoderConfig(**{**fields, **overrides})


def _get(hf: Mapping[str, Any], name: str) -> Any:
  if hf.get(name) is None:
    raise errors.UserError(f"config.json: the field {name} is missing")
  return hf[name]


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise errors.UserError(
      f"config.json: activation {name!r} is unknown; known are {', '.join(_ACTIVATIONS)}"
    )
  return _ACTIVATIONS[name]


def _gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
  width, heads = _get(hf, "n_embd"), _get(hf, "n_head")
  if hf.get("scale_attn_by_inverse_layer_idx"):
    raise errors.UserError("config.json: scale_attn_by_inverse_layer_idx is not supported")
  return {
    "vocabulary": _get(hf, "vocab_size"),
    "width": width,
    "hidden": hf.get("n_inner") or 4 * width,
    "layers": _get(hf, "n_layer"),
    "heads": heads,
    "groups": heads,
    "head_dim": width // heads,
    "norm": "layer",
    "norm_epsilon": hf.get("layer_norm_epsilon", 1e-5),
    "activation": _activation(hf.get("activation_function", "gelu_new")),
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "feed_forward_bias": True,
    "learned_positions": _get(hf, "n_positions"),
    "ropes": (),
    "attention_scale": 1.0 if hf.get("scale_attn_weights") is False else 0.0,
    "tied": hf.get("tie_word_embeddings", True),
    "max_length": _get(hf, "n_positions"),
    "adapted": tuple(name for name in decoder.MAPS if name != "gate"),
  }


def _llama_like(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
  gemma = family.startswith("gemma")
  width, heads, layers = (
    _get(hf, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
  )
  bias = bool(hf.get("attention_bias", False))
  length = hf.get("max_position_embeddings") or 2048
  kinds = _layer_types(hf, family, layers)
  window = hf.get("sliding_window") or 0
  windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
  ropes, layer_ropes = _ropes(hf, family, kinds, length)
  fields = {
    "vocabulary": _get(hf, "vocab_size"),
    "width": width,
    "hidden": _get(hf, "intermediate_size"),
    "layers": layers,
    "heads": heads,
    "groups": hf.get("num_key_value_heads") or heads,
    "head_dim": hf.get("head_dim") or width // heads,
    "norm": "rms_offset" if gemma else "rms",
    "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
    "post_norms": gemma,
    "qk_norm": family in ("qwen3", "gemma3_text"),
    # Gemma's code ignores `hidden_act`, so it is not read.
    "activation": _activation(
      hf.get("hidden_activation", "gelu_pytorch_tanh") if gemma else hf.get("hidden_act", "silu")
    ),
    "qkv_bias": True if family == "qwen2" else bias,
    "output_bias": False if family == "qwen2" else bias,
    "feed_forward_bias": bool(hf.get("mlp_bias", False)),
    "ropes": ropes,
    "layer_ropes": layer_ropes,
    "layer_windows": windows if any(windows) else (),
    "tied": hf.get("tie_word_embeddings", gemma),
    "max_length": length,
  }
  if gemma:
    fields |= {
      "embedding_scale": width**0.5,
      "attention_scale": (hf.get("query_pre_attn_scalar") or 256) ** -0.5,
      "attention_soft_cap": hf.get("attn_logit_softcapping") or 0.0,
      "logit_soft_cap": hf.get("final_logit_softcapping") or 0.0,
    }
  return fields


def _layer_types(hf: Mapping[str, Any], family: str, layers: int) -> list[str]:
  """'full_attention' or 'sliding_attention' for every layer."""
  full, sliding = "full_attention", "sliding_attention"
  if hf.get("layer_types"):
    kinds = list(hf["layer_types"])
    unknown = set(kinds) - {full, sliding}
    if unknown or len(kinds) != layers:
      raise errors.UserError(
        f"config.json: layer_types has {len(kinds)} entries ({', '.join(sorted(set(kinds)))});"
        f" it must have {layers} of {full} or {sliding}"
      )
    return kinds
  if family == "gemma2":
    return [full if index % 2 else sliding for index in range(layers)]
  if family == "gemma3_text":
    period = hf.get("sliding_window_pattern") or 6
    return [sliding if (index + 1) % period else full for index in range(layers)]
  if family in ("qwen2", "qwen3"):
    full_layers = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else layers
    return [full if index < full_layers else sliding for index in range(layers)]
  return [sliding if family == "mistral" and hf.get("sliding_window") else full] * layers


def _ropes(hf, family, kinds, length) -> tuple[tuple[rope.RopeConfig, ...], tuple[int, ...]]:
  """The kinds of rotation, and the index of each layer's kind (empty if there is one kind)."""
  parameters = hf.get("rope_parameters")
  sliding = None  # full and sliding layers share one rotation
  if parameters and "full_attention" in parameters:
    full = parameters["full_attention"]
    sliding = parameters.get("sliding_attention") or full
  elif parameters:
    full = parameters
  else:
    full = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})}
    if family == "gemma3_text":
      full["rope_theta"] = full["rope_theta"] or 1_000_000.0
      sliding = {"rope_theta": hf.get("rope_local_base_freq") or 10_000.0}
  if sliding is None:
    return (_rope(full, hf, length),), ()
  ropes = (_rope(full, hf, length), _rope(sliding, hf, length))
  return ropes, tuple(int(kind == "sliding_attention") for kind in kinds)


def _rope(parameters: Mapping[str, Any], hf: Mapping[str, Any], length: int) -> rope.RopeConfig:
  kind = parameters.get("rope_type") or parameters.get("type") or "default"
  if kind not in rope.KINDS:
    raise errors.UserError(
      f"config.json: rope scaling {kind!r} is unknown; known are {', '.join(rope.KINDS)}"
    )
  if hf.get("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0)) not in (
    1,
    1.0,
    None,
  ):
    raise errors.UserError("config.json: partial_rotary_factor other than 1 is not supported")
  fields: dict[str, Any] = {"theta": float(parameters.get("rope_theta") or 10_000.0), "kind": kind}
  if kind != "default":
    fields["factor"] = float(_get(parameters, "factor"))
  if kind in ("llama3", "yarn"):
    fields["original_length"] = parameters.get("original_max_position_embeddings") or length
  if kind == "llama3":
    fields |= {
      "low": parameters.get("low_freq_factor", 1.0),
      "high": parameters.get("high_freq_factor", 4.0),
    }
  if kind == "yarn":
    if parameters.get("mscale") or parameters.get("mscale_all_dim"):
      raise errors.UserError("config.json: YaRN's mscale is not supported")
    fields |= {
      "low": parameters.get("beta_slow") or 1.0,
      "high": parameters.get("beta_fast") or 32.0,
      "attention_factor": parameters.get("attention_factor") or 0.0,
      "truncate": parameters.get("truncate", True),
    }
  return rope.RopeConfig(**fields)
