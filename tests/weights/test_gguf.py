"""GGUF files, written by llama.cpp's rules: architectures, storage types and damaged files."""

import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.gguf import dequant

from qlora_jax import errors
from qlora_jax.instructions import wheels
from qlora_jax.weights import gguf_header, gguf_layout, sources

SIZES = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "vocab_size": 64,
  "max_position_embeddings": 128,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
GEMMA = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
MODELS = {
  "llama": ("Llama", SIZES | {"num_hidden_layers": 2, "rms_norm_eps": 1e-5}),
  "llama biased": ("Llama", SIZES | {"num_hidden_layers": 1, "attention_bias": True}),
  "llama tied": ("Llama", SIZES | {"num_hidden_layers": 1, "tie_word_embeddings": True}),
  "llama3": (
    "Llama",
    SIZES
    | {"num_hidden_layers": 1, "head_dim": 64, "rope_theta": 500_000.0, "rope_scaling": LLAMA3},
  ),
  "llama linear": (
    "Llama",
    SIZES | {"num_hidden_layers": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  ),
  "qwen2": ("Qwen2", SIZES | {"num_hidden_layers": 2, "rope_theta": 1e6}),
  "qwen3": ("Qwen3", SIZES | {"num_hidden_layers": 2, "head_dim": 16}),
  "gemma2": (
    "Gemma2",
    GEMMA
    | {"num_hidden_layers": 3, "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
  ),
  "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7}),
  "gpt2": (
    "GPT2",
    {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, "n_inner": 48},
  ),
}


def _model(name):
  family, changes = MODELS[name]
  torch.manual_seed(0)
  if family == "GPT2":
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**changes))
  else:
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, config_class)(**changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0, 0.3)  # also norms and biases, so that swapped tensors are detected
  return model.eval()


def _permuted(value, heads):
  """llama.cpp's order of query and key rows: pairs (j, j + K/2) side by side."""
  by_head = value.reshape(heads, 2, -1, *value.shape[1:])
  return np.ascontiguousarray(by_head.swapaxes(1, 2)).reshape(value.shape)


def _write(path, name, model, without=()):
  """Writes the file of convert_hf_to_gguf.py, with the gguf package's table of names."""
  config, architecture = model.config, name.split()[0].replace("llama3", "llama")
  table = gguf.get_tensor_name_map(
    next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture),
    config.num_hidden_layers,
  )
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_head_count(config.num_attention_heads)
  if architecture == "gpt2":
    writer.add_feed_forward_length(config.n_inner)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
  else:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or 8
    if architecture in ("qwen3", "gemma2", "gemma3"):
      writer.add_key_length(head_dim)
    if architecture == "llama":
      writer.add_rope_dimension_count(head_dim)
    _write_rope(writer, name, head_dim)
  if architecture.startswith("gemma"):
    writer.add_sliding_window(config.sliding_window)
  if architecture == "gemma2":
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
  for hf_name, tensor in model.state_dict().items():
    if hf_name == "lm_head.weight" and config.tie_word_embeddings:
      continue
    stem, _, suffix = hf_name.rpartition(".")
    value = tensor.detach().numpy()
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
      kind = "attention" if stem.endswith("q_proj") else "key_value"
      value = _permuted(value, getattr(config, f"num_{kind}_heads"))
    if architecture.startswith("gemma") and hf_name.endswith("norm.weight"):
      value = value + 1
    if architecture == "gpt2" and stem.split(".")[-1] in ("c_attn", "c_proj", "c_fc"):
      value = np.ascontiguousarray(value.T)
    theirs = f"{table.get_name(stem)}.{suffix}"
    if theirs not in without:
      writer.add_tensor(theirs, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _write_rope(writer, name, head_dim):
  changes = MODELS[name][1]
  if "rope_theta" in changes:
    writer.add_rope_freq_base(changes["rope_theta"])
  if name == "llama linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
  if name == "llama3":
    factors = []
    for exponent in range(0, head_dim, 2):
      wavelength = 2 * np.pi * 500_000.0 ** (exponent / head_dim)
      if wavelength < 8192 / 4:
        factors.append(1.0)
      elif wavelength > 8192:
        factors.append(8.0)
      else:
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert len(set(factors)) > 3
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def _rebuilt(source):
  """A transformers model from our config and our tensors."""
  classes = {"gemma3_text": "Gemma3TextConfig", "gpt2": "GPT2Config"}
  kind = source.config["model_type"]
  config_class = getattr(transformers, classes.get(kind, f"{kind.capitalize()}Config"))
  model_class = getattr(transformers, source.config["architectures"][0])
  model = model_class(config_class(**source.config)).eval()
  state = {name: torch.from_numpy(source.read(name).copy()) for name in source.names()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert unexpected == []
  assert missing in ([], ["lm_head.weight"])
  return model


@pytest.mark.parametrize("name", sorted(MODELS))
def test_architecture_comes_back_as_it_was(tmp_path, name):
  model = _model(name)
  _write(tmp_path / "model.gguf", name, model)
  source = sources.open_source(tmp_path / "model.gguf")
  state = dict(model.state_dict())
  if model.config.tie_word_embeddings:
    del state["lm_head.weight"]
  assert source.names() == sorted(state)
  for key, tensor in state.items():
    assert source.shape(key) == tuple(tensor.shape)
    # The 1 was added to Gemma's norms and subtracted again.
    np.testing.assert_allclose(source.read(key), tensor.numpy(), rtol=0, atol=2e-7, err_msg=key)
  tokens = torch.arange(2 * 24).reshape(2, 24) % 64
  with torch.no_grad():
    expected, actual = model(tokens).logits, _rebuilt(source)(tokens).logits
  # Equal configs and weights give equal numbers; Gemma's norms differ by one rounding.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


def test_largest_gemmas_scale_queries_by_the_width():
  for kind, layers, scalar in (("gemma2", 46, 144), ("gemma2", 26, 128), ("gemma3", 62, 144)):
    key = {
      "general.architecture": kind,
      f"{kind}.attention.head_count": 32,
      f"{kind}.embedding_length": 4608,
      f"{kind}.attention.key_length": 128,
      f"{kind}.feed_forward_length": 8,
      f"{kind}.block_count": layers,
      f"{kind}.context_length": 8192,
      f"{kind}.attention.layer_norm_rms_epsilon": 1e-6,
      f"{kind}.attention.sliding_window": 4096,
      "gemma2.attn_logit_softcapping": 50.0,
      "gemma2.final_logit_softcapping": 30.0,
    }
    table = {
      "token_embd.weight": gguf_header.Tensor((8, 4608), gguf.GGMLQuantizationType.F32, 0, 0)
    }
    config = gguf_layout.config(gguf_header.Header(None, key, table))
    assert config["query_pre_attn_scalar"] == scalar
    assert config["rms_norm_eps"] == 1e-6


PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def _one_layer(path, kind, data, shape):
  """A file with the given bytes as the embedding."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(64)
  writer.add_embedding_length(shape[1])
  writer.add_block_count(0)
  writer.add_head_count(4)
  writer.add_feed_forward_length(8)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tensor("token_embd.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return sources.open_source(path)


def _transformers(data, number):
  return dequant.dequantize(torch.from_numpy(data), int(number)).numpy()


def _five_bits(data, number):
  """Q5_0 and Q5_1, which transformers lacks: 32 numbers of 4 low bits and one high bit each."""
  values = []
  offset = number == gguf.GGMLQuantizationType.Q5_1
  for block in data.reshape(-1, 24 if offset else 22):
    scale, *low = block[: 4 if offset else 2].view(np.float16).astype(np.float32)
    high, nibbles = int(block[-20:-16].view(np.uint32)[0]), block[-16:]
    for index in range(32):
      four = int(nibbles[index % 16]) >> (4 if index >= 16 else 0) & 15
      five = four | (high >> index & 1) << 4
      values.append(scale * five + low[0] if offset else scale * (five - 16))
  return np.array(values, np.float32)


@pytest.mark.parametrize("kind", [*PLAIN, *BLOCKS, "IQ4_NL", "IQ4_XS"])
def test_storage_type_matches_an_independent_reader(tmp_path, kind):
  rng, shape = np.random.default_rng(1), (6, 512)
  number = gguf.GGMLQuantizationType[kind]
  if kind in PLAIN:
    expected = rng.normal(size=shape).astype(PLAIN[kind])
    data = expected if kind != "BF16" else expected.view(np.uint8)
  else:
    block, size = gguf.GGML_QUANT_SIZES[number]
    # Any bytes are a valid block. Without this bit, no float16 is infinite or NaN.
    data = rng.integers(0, 256, (shape[0], shape[1] // block * size), dtype=np.uint8) & 0xBF
    reference = _five_bits if kind.startswith("Q5_") and kind != "Q5_K" else _transformers
    expected = reference(data, number).reshape(shape)
  source = _one_layer(tmp_path / "m.gguf", kind, data, shape)
  value = source.read("model.embed_tokens.weight")
  assert value.shape == source.shape("model.embed_tokens.weight") == shape
  assert value.dtype == (PLAIN.get(kind) or np.float32)
  # The two implementations add float32 parts of a block in different orders.
  scale = np.abs(np.asarray(expected, np.float32)).max()
  np.testing.assert_allclose(
    np.asarray(value, np.float32), np.asarray(expected, np.float32), rtol=1e-6, atol=1e-6 * scale
  )


def test_header_agrees_with_the_package(tmp_path):
  path = wheels.find(*sources.BUILT_IN["smollm2-135m-instruct"])
  ours = gguf_header.read(path)
  # The package needs seconds for a real vocabulary; a small file covers the value types.
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  writer.add_uint8("a", 200)
  writer.add_int8("b", -100)
  writer.add_uint16("c", 60_000)
  writer.add_int16("d", -30_000)
  writer.add_uint32("e", 4_000_000_000)
  writer.add_int32("f", -2_000_000_000)
  writer.add_float32("g", 1.5)
  writer.add_bool("h", True)
  writer.add_string("i", "ünïcode")
  writer.add_array("j", ["a", "", "ß"])
  writer.add_array("k", [1, -2, 3])
  writer.add_uint64("l", 2**63)
  writer.add_int64("m", -(2**62))
  writer.add_float64("n", 0.1)
  writer.add_array("o", [True, False])
  writer.add_custom_alignment(64)
  writer.add_tensor("x", np.ones((3, 5), np.float32))
  writer.add_tensor("y", np.ones(7, np.float16))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  reader = gguf.GGUFReader(tmp_path / "m.gguf")
  small = gguf_header.read(tmp_path / "m.gguf")
  theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
  assert small.metadata == theirs
  for tensor in reader.tensors:
    mine = small.tensors[tensor.name]
    assert (mine.shape, mine.offset, mine.size) == (
      tuple(tensor.shape.tolist()[::-1]),
      tensor.data_offset,
      tensor.n_bytes,
    )
  assert len(ours.tensors) == 272
  assert len(ours.metadata["tokenizer.ggml.merges"]) == 48900


def _refused(path, reason):
  with pytest.raises(errors.UserError) as caught:
    sources.open_source(path)
  message = str(caught.value)
  assert reason in message, message
  assert path.name in message
  assert "\n" not in message


def test_every_truncation_is_refused(tmp_path):
  _write(tmp_path / "whole.gguf", "qwen2", _model("qwen2"))
  data = (tmp_path / "whole.gguf").read_bytes()
  path = tmp_path / "cut.gguf"
  header = len(data) - sum(
    t.size for t in gguf_header.read(tmp_path / "whole.gguf").tensors.values()
  )
  for length in [*range(0, header, 97), header + 100, len(data) // 2]:
    path.write_bytes(data[:length])
    _refused(path, "is truncated")


def test_flipped_bytes_give_one_line_or_a_source(tmp_path):
  """Damage to any byte of the header raises UserError or nothing."""
  _write(tmp_path / "whole.gguf", "llama", _model("llama tied"))
  data = bytearray((tmp_path / "whole.gguf").read_bytes())
  size = sum(t.size for t in gguf_header.read(tmp_path / "whole.gguf").tensors.values())
  path, refused = tmp_path / "flipped.gguf", 0
  for position in range(0, len(data) - size, 3):
    damaged = data.copy()
    damaged[position] ^= 0xFF
    path.write_bytes(damaged)
    try:
      sources.open_source(path)
    except errors.UserError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 200


def test_what_is_not_known_is_refused(tmp_path):
  path = tmp_path / "m.gguf"
  path.write_bytes(b"PK\x03\x04" + bytes(64))
  _refused(path, "is not a GGUF file")
  path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(64))
  _refused(path, "version 1")
  path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(64))
  _refused(path, "big-endian")

  for architecture, fields, reason in (
    ("mamba", {}, "'mamba' is not supported"),
    ("llama", {"expert_count": 8}, "mixtures of experts"),
    ("llama", {"uint16": ("split.count", 3)}, "one of 3 parts"),
    ("llama", {}, "no tensor token_embd.weight"),
  ):
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
      getattr(writer, f"add_{name}")(*(value if isinstance(value, tuple) else (value,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    _refused(path, reason)

  _one_layer(path, "F32", np.ones((4, 256), np.float32), (4, 256))
  for name, value, kind, reason in (
    ("blk.0.ssm_a.weight", np.ones(4, np.float32), "F32", "such as blk.0.ssm_a.weight"),
    ("output.weight", np.zeros((4, 66), np.uint8), "IQ2_XXS", "has the type IQ2_XXS"),
    ("rope_freqs.weight", np.ones(7, np.float32), "F32", "not Llama 3's rotary factors"),
  ):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tensor("token_embd.weight", np.ones((4, 256), np.float32))
    writer.add_tensor(name, value, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _refused(path, reason)
