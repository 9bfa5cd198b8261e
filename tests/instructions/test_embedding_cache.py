"""The disk cache: hits load no encoder, damaged files are replaced, no collisions."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from qlora_jax import errors
from qlora_jax.instructions import cache, encoders

TEXTS = ["Sort the words.", "Count the letters.", "Sort the words."]


@pytest.fixture
def created(monkeypatch):
  """Names of the encoders that were loaded, in order."""
  names = []
  create = encoders.create
  monkeypatch.setattr(encoders, "create", lambda name: names.append(name) or create(name))
  return names


def test_embed_matches_the_encoder_and_keeps_order_and_repetitions(tmp_path):
  embeddings = cache.embed(TEXTS, "wordllama", tmp_path)
  np.testing.assert_array_equal(embeddings, encoders.create("wordllama").encode(TEXTS))
  assert embeddings.dtype == np.float32
  assert len(list(tmp_path.rglob("*.f32"))) == 2


def test_a_hit_does_not_load_the_encoder(tmp_path, created):
  first = cache.embed(TEXTS, "wordllama", tmp_path)
  assert created == ["wordllama"]
  np.testing.assert_array_equal(cache.embed(TEXTS[::-1], "wordllama", tmp_path), first[::-1])
  assert created == ["wordllama"]
  cache.embed([*TEXTS, "A new one."], "wordllama", tmp_path)
  assert created == ["wordllama"] * 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "swapped"])
def test_a_damaged_file_is_made_anew(tmp_path, created, damage):
  expected = cache.embed(TEXTS, "wordllama", tmp_path)
  path, other = sorted(tmp_path.rglob("*.f32"))
  content = path.read_bytes()
  broken = {
    "truncated": content[:-5],
    "flipped": content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "empty": b"",
    "swapped": other.read_bytes(),
  }[damage]
  path.write_bytes(broken)
  np.testing.assert_array_equal(cache.embed(TEXTS, "wordllama", tmp_path), expected)
  assert created == ["wordllama"] * 2
  assert path.read_bytes() == content


def test_two_encoders_share_a_folder(tmp_path):
  assert cache.embed(TEXTS, "wordllama", tmp_path).shape == (3, 256)
  assert cache.embed(TEXTS, "minilm", tmp_path).shape == (3, 384)
  assert cache.embed(TEXTS, "wordllama", tmp_path).shape == (3, 256)


def test_another_fingerprint_is_another_entry(tmp_path, created, monkeypatch):
  cache.embed(TEXTS, "wordllama", tmp_path)
  monkeypatch.setattr(encoders, "fingerprint", lambda name: f"{name}-other")
  cache.embed(TEXTS, "wordllama", tmp_path)
  assert created == ["wordllama"] * 2


def test_two_processes_fill_one_folder(tmp_path):
  code = (
    "import sys; from qlora_jax.instructions import cache;"
    "cache.embed([f'text {n}' for n in range(50)], 'wordllama', sys.argv[1])"
  )
  root = pathlib.Path(cache.__file__).parents[2]
  command = [sys.executable, "-c", code, str(tmp_path)]
  processes = [subprocess.Popen(command, cwd=root) for _ in range(2)]
  assert [process.wait(timeout=60) for process in processes] == [0, 0]
  assert len(list(tmp_path.rglob("*.f32"))) == 50
  assert not list(tmp_path.rglob("*.tmp"))


def test_no_texts_give_an_empty_matrix(tmp_path, created):
  assert cache.embed([], "minilm", tmp_path).shape == (0, 384)
  assert created == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(errors.UserError, match=r"cache_dir: cannot write .*file"):
    cache.embed(TEXTS, "wordllama", file)


def test_unknown_encoder_and_bare_string_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match="known:"):
    cache.embed(TEXTS, "bert", tmp_path)
  with pytest.raises(TypeError, match="sequence"):
    cache.embed("a text", "wordllama", tmp_path)


def test_default_folder_follows_xdg(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
  assert cache.default_dir() == pathlib.Path("somewhere", "qlora_jax", "instructions")
