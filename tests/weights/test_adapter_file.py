"""Adapters load as they were saved, completely, and only on the base of their training."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from safetensors import numpy as safetensors_numpy

import qlora_jax
from qlora_jax import errors
from qlora_jax.weights import adapter_file

BASE = "ab" * 32
METADATA = {
  "adapter": {"name": "queryable", "rank": 4, "atoms": 8},
  "model_name": "smollm2-135m-instruct",
  "model_config": {"hidden_size": 576},
  "base_fingerprint": BASE,
  "training": {"steps": 100, "loss": 1.25},
}


def _params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "adapter": {
      "blocks": {"lora_a": rng.normal(size=(3, 16, 4)).astype(np.float32)},
      "memory": {
        "atoms": jnp.asarray(rng.normal(size=(8, 4, 4)), jnp.bfloat16),
        "atom_keys": rng.normal(size=(8, 5)).astype(np.float16),
      },
    },
    "projection": {"matrix": rng.normal(size=(6, 2)), "scale": np.float32(0.5)},
    "steps": np.arange(3),
  }


def _assert_equal(actual, expected):
  expected = jax.tree.map(np.asarray, expected)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert isinstance(ours, np.ndarray)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tobytes() == theirs.tobytes()


@pytest.fixture
def saved(tmp_path):
  adapter_file.save(tmp_path / "adapter", _params(), METADATA)
  return tmp_path / "adapter"


def test_round_trip(saved):
  params, metadata = adapter_file.load(saved, BASE, expected=_params())
  _assert_equal(params, _params())
  assert params["adapter"]["memory"]["atoms"].dtype == ml_dtypes.bfloat16
  assert metadata == METADATA
  assert sorted(path.name for path in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]
  assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_files_are_readable_by_others(saved):
  tensors = safetensors_numpy.load_file(saved / "adapter.safetensors")
  assert "adapter/memory/atom_keys" in tensors
  description = json.loads((saved / "adapter.json").read_text())
  assert description["library"] == {"name": "qlora_jax", "version": qlora_jax.__version__}
  assert description["tensors"]["adapter/memory/atoms"]["dtype"] == "bfloat16"
  assert saved.stat().st_mode & 0o777 == 0o755


def test_non_contiguous_arrays_are_saved_as_seen(tmp_path):
  params = {"a": np.arange(12.0).reshape(3, 4).T, "b": np.arange(10)[::2]}
  adapter_file.save(tmp_path / "a", params, METADATA)
  _assert_equal(adapter_file.load(tmp_path / "a", BASE)[0], params)


def test_another_base_is_refused_with_both_names(saved):
  with pytest.raises(errors.UserError) as caught:
    adapter_file.load(saved, "cd" * 32, base_name="Qwen2.5-0.5B")
  for part in ("smollm2-135m-instruct", "Qwen2.5-0.5B", BASE[:16], "cd" * 8):
    assert part in str(caught.value)
  adapter_file.load(saved, None)


def test_saving_again_replaces_everything(saved):
  params = {"other": np.ones(2)}
  adapter_file.save(saved, params, METADATA | {"training": None})
  loaded, metadata = adapter_file.load(saved, BASE)
  _assert_equal(loaded, params)
  assert metadata["training"] is None
  assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def _refused(path, *parts, **options):
  with pytest.raises(errors.UserError) as caught:
    adapter_file.load(path, BASE, **options)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def test_wrong_tensors_are_listed_together(saved):
  path = saved / "adapter.safetensors"
  tensors = safetensors_numpy.load_file(path)
  del tensors["steps"], tensors["projection/scale"]
  tensors["projection/matrix"] = np.ones((2, 6))
  tensors["adapter/memory/atom_keys"] = tensors["adapter/memory/atom_keys"].astype(np.float32)
  tensors["adapter/more"] = np.ones(1)
  safetensors_numpy.save_file(tensors, path)
  _refused(
    saved,
    "missing projection/scale; missing steps; extra adapter/more",
    "adapter/memory/atom_keys is float32 [8, 5], not float16 [8, 5]",
    "projection/matrix is float64 [2, 6], not float64 [6, 2]",
  )


def test_adapter_that_does_not_fit_the_model_is_refused(saved):
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _params()))
  expected = {"adapter": shapes["adapter"], "gate": jax.ShapeDtypeStruct((2,), jnp.float32)}
  expected["adapter"]["blocks"]["lora_a"] = jax.ShapeDtypeStruct((4, 16, 4), jnp.float32)
  _refused(
    saved,
    "does not fit the model: missing gate; extra projection/matrix",
    "adapter/blocks/lora_a is float32 [3, 16, 4], not float32 [4, 16, 4]",
    expected=expected,
  )


def test_truncated_and_damaged_files_are_refused(saved):
  tensors, description = saved / "adapter.safetensors", saved / "adapter.json"
  whole = tensors.read_bytes()
  for length in (0, 7, 100, len(whole) - 1):
    tensors.write_bytes(whole[:length])
    _refused(saved, "adapter.safetensors", "damaged or truncated")
  flipped = bytearray(whole)
  flipped[-1] ^= 1
  tensors.write_bytes(flipped)
  _refused(saved, "is damaged in")
  tensors.unlink()
  _refused(saved, "adapter.safetensors", "cannot be read")
  tensors.write_bytes(whole)

  text = description.read_text()
  description.write_text(text[: len(text) // 2])
  _refused(saved, "adapter.json", "damaged or truncated")
  description.write_text("[]")
  _refused(saved, "adapter.json", "format None")
  description.write_text(text.replace('"format": 1', '"format": 2'))
  _refused(saved, "has the format 2")
  description.write_text(text.replace('"base_fingerprint"', '"other"'))
  _refused(saved, "lacks base_fingerprint")
  description.unlink()
  _refused(saved, "adapter.json", "cannot be read")
  _refused(saved.parent / "nothing", "cannot be read")


def test_other_files_are_never_deleted(tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").write_text("x")
  (tmp_path / "file").write_text("x")
  for name, reason in (("full", "thesis.tex"), ("file", "is a file")):
    with pytest.raises(errors.UserError, match=reason):
      adapter_file.save(tmp_path / name, _params(), METADATA)
  assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_programming_errors_are_value_errors(tmp_path):
  with pytest.raises(ValueError, match="lack model_config"):
    adapter_file.save(
      tmp_path / "a", _params(), {k: v for k, v in METADATA.items() if k != "model_config"}
    )
  for params, reason in (
    ({"a/b": np.ones(1)}, "'a/b'"),
    ({"a": object()}, "a is a object"),
    ({}, "at least one"),
  ):
    with pytest.raises(ValueError, match=reason):
      adapter_file.save(tmp_path / "a", params, METADATA)
  with pytest.raises(TypeError):
    adapter_file.save(tmp_path / "a", _params(), METADATA | {"training": object()})
  assert list(tmp_path.iterdir()) == []


# Every system call of a save, in order; the process can die after each.
STEPS = ("tempfile.mkdtemp", "pathlib.Path.write_bytes", "pathlib.Path.write_text", "os.fsync")
STEPS += ("pathlib.Path.rename",)


@pytest.mark.parametrize("existing", [True, False])
def test_killed_save_leaves_the_old_or_the_new_adapter(tmp_path, existing):
  """A child process kills itself after the n-th step, for every n until a save finishes."""
  script = textwrap.dedent(f"""
    import os, pathlib, shutil, signal, sys, tempfile
    import numpy as np
    from qlora_jax.weights import adapter_file

    def counted(step):
      def call(*args, **kwargs):
        result = step(*args, **kwargs)
        global steps_left
        steps_left -= 1
        if steps_left == 0:
          os.kill(os.getpid(), signal.SIGKILL)
        return result
      return call

    for name in {STEPS!r}:
      owner, attribute = name.rsplit(".", 1)
      owner = eval(owner)
      setattr(owner, attribute, counted(getattr(owner, attribute)))
    metadata = {METADATA!r}
    for steps_left in range(1, 100):
      folder = sys.argv[1] + f"/{{steps_left}}"
      number, pid = steps_left, os.fork()
      if pid == 0:
        adapter_file.save(folder + "/adapter", {{"new": np.ones(3)}}, metadata)
        os._exit(0)
      _, status = os.waitpid(pid, 0)
      print(number, os.waitstatus_to_exitcode(status), flush=True)
      steps_left = number
      if os.waitstatus_to_exitcode(status) == 0:
        break
  """)
  for number in range(1, 20):
    (tmp_path / str(number)).mkdir()
    if existing:
      adapter_file.save(tmp_path / str(number) / "adapter", {"old": np.zeros(2)}, METADATA)
  done = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  codes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
  assert codes, done.stderr
  assert codes[-1][1] == 0
  assert [code for _, code in codes[:-1]] == [-signal.SIGKILL] * (len(codes) - 1)
  assert len(codes) > 7
  seen = []
  for number, _ in codes:
    folder = tmp_path / str(number) / "adapter"
    try:
      params, _ = adapter_file.load(folder, BASE)
    except errors.UserError as error:
      assert not existing, f"killed after step {number}: {error}"
      assert "cannot be read" in str(error)
      seen.append("none")
    else:
      seen.append("/".join(params))
    # Leftover files do not prevent the next save, which cleans up its target.
    adapter_file.save(folder, {"next": np.ones(1)}, METADATA)
    assert list(adapter_file.load(folder, BASE)[0]) == ["next"]
  before = "old" if existing else "none"
  assert seen == sorted(seen, key=[before, "new"].index)
  assert set(seen) == {before, "new"}


def test_failing_write_keeps_the_old_adapter(saved, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.UserError, match="No space left"):
    adapter_file.save(saved, {"new": np.ones(1)}, METADATA)
  monkeypatch.undo()
  _assert_equal(adapter_file.load(saved, BASE)[0], _params())
  assert [path.name for path in saved.parent.iterdir()] == ["adapter"]
