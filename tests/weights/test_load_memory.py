"""Host memory of reading weights: at most 1.3 times the model; used pages are released."""

import pathlib
import re
import weakref

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qlora_jax.models import families
from qlora_jax.weights import hf_layout, safetensors_source, source

CONFIG = {
  "model_type": "llama",
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 8,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "vocab_size": 128,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 64,
  "tie_word_embeddings": True,
  "hidden_act": "silu",
}


class Meter:
  """Bytes of live arrays, and their maximum."""

  def __init__(self):
    self.now = self.peak = 0

  def add(self, array: np.ndarray) -> np.ndarray:
    self._count(array.nbytes)
    weakref.finalize(array, self._count, -array.nbytes)
    return array

  def _count(self, size: int) -> None:
    self.now += size
    self.peak = max(self.peak, self.now)


class Quantised(source.Source):
  """A model whose tensors are read as float32, as from a quantised file."""

  def __init__(self, config, meter, keeps=False):
    self.name, self.config, self.meter = "quantised", CONFIG, meter
    self.reads, self.unreleased, self.all_values = [], set(), [] if keeps else None
    abstract = hf_layout.decoder.abstract(config)["base"]
    flat = hf_layout.traverse_util.flatten_dict(hf_layout.nn.unbox(abstract), sep="/")
    self.shapes = {
      tensor.name: tensor.stored_shape(leaf.shape[1:] if path.startswith("stack/") else leaf.shape)
      for path, leaf in flat.items()
      for tensor in hf_layout.layout(config)[path]
    }

  def names(self):
    return sorted(self.shapes)

  def shape(self, name):
    return self.shapes[name]

  def read(self, name):
    assert not self.unreleased, "a tensor is read before the previous one is released"
    self.reads.append(name)
    self.unreleased.add(name)
    value = np.full(self.shapes[name], len(self.reads), np.float32)
    if self.all_values is not None:
      self.all_values.append(value)
    return self.meter.add(value)

  def release(self, name):
    self.unreleased.remove(name)

  def stored(self, name):
    raise AssertionError("not used in this test")

  def tokenizer(self):
    raise AssertionError("not used in this test")


def peak_of_loading(monkeypatch, keeps):
  """Peak bytes of weights divided by the model's bytes in bfloat16, and the source."""
  meter, aligned = Meter(), hf_layout._aligned

  def counted(shape, dtype):
    # These arrays become the model and are never released.
    meter.now += int(np.prod(shape)) * dtype.itemsize
    meter.peak = max(meter.peak, meter.now)
    return aligned(shape, dtype)

  monkeypatch.setattr(hf_layout, "_aligned", counted)
  config = families.config_from_hf(CONFIG, layers_per_block=2, base_dtype="bfloat16")
  weights = Quantised(config, meter, keeps)
  base = hf_layout.load_base(weights, config)
  size = sum(leaf.nbytes for leaf in hf_layout.jax.tree.leaves(base))
  return meter.peak / size, weights


def test_loading_takes_less_than_1_3_times_the_model_in_its_target_type(monkeypatch):
  ratio, weights = peak_of_loading(monkeypatch, keeps=False)
  assert 1.0 <= ratio < 1.3
  assert sorted(weights.reads) == weights.names()  # each exactly once
  assert not weights.unreleased


def test_a_model_that_is_read_whole_would_be_seen(monkeypatch):
  ratio, _ = peak_of_loading(monkeypatch, keeps=True)
  assert ratio > 2.5  # float32 in addition to bfloat16


def resident_file_pages():
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"RssFile:\s+(\d+)", status)[1])


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs RssFile of Linux")
def test_a_released_tensor_leaves_no_pages_and_can_be_read_again(tmp_path):
  value = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
  tensors = {"a": np.ones(3, np.float32), "b": value, "c": np.full(5, 7.0, np.float32)}
  safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text("{}")
  weights = safetensors_source.SafetensorsSource(tmp_path, "mine")
  read = weights.read("b")
  before = resident_file_pages()
  np.testing.assert_array_equal(read, value)  # touches every page
  touched = resident_file_pages()
  weights.release("b")
  after = resident_file_pages()
  assert touched - before > 0.9 * value.nbytes
  assert touched - after > 0.9 * value.nbytes
  for name, expected in tensors.items():
    np.testing.assert_array_equal(weights.read(name), expected)
    weights.release(name)
  np.testing.assert_array_equal(read, value)
