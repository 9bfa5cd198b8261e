"""Checkpoints: what comes back, what is kept, what damage is seen, and on which devices."""

import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading

import jax
import ml_collections
import numpy as np
import pytest
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.training import checkpoint, checksums, resume

ROOT = pathlib.Path(__file__).parents[2]


def tree(step=0):
  rng = np.random.default_rng(step)
  return {
    "params": {
      "a": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
      "half": jnp.asarray(rng.normal(size=(4, 3)), jnp.bfloat16),
    },
    "moments": (jnp.asarray(rng.normal(size=(64, 64)), jnp.float32), jnp.int32(step)),
    "key": jax.random.key(step),
  }


def plain(values):
  """NumPy arrays that can be compared, keys among them."""
  return jax.tree.map(
    lambda leaf: np.asarray(
      jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    ),
    values,
  )


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, plain(found), plain(expected))


def saved(folder, steps=(1, 2, 3), keep=3, **fields):
  with checkpoint.Checkpointer(folder, keep=keep, **fields) as saver:
    for step in steps:
      saver.save(step, tree(step), {"data": {"row": step}})
  return folder


def opened(folder, **fields):
  """What a new process finds: (restored, lines told)."""
  lines = []
  with checkpoint.Checkpointer(folder, keep=3, log=lines.append, **fields) as saver:
    return saver.restore(tree()), lines


def test_a_tree_comes_back_in_its_bits_with_what_was_kept_beside_it(tmp_path):
  found, lines = opened(saved(tmp_path / "run"))
  assert (found.step, found.extra, lines) == (3, {"data": {"row": 3}}, [])
  assert_same(found.tree, tree(3))
  assert found.tree["params"]["half"].dtype == jnp.bfloat16
  assert jax.random.bits(found.tree["key"]) == jax.random.bits(jax.random.key(3))


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert opened(tmp_path / "run") == (None, [])
  assert checkpoint.restore(tmp_path / "absent", tree()) is None
  assert not (tmp_path / "absent").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
  nats = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 4.0, 7: None}
  with checkpoint.Checkpointer(tmp_path, keep=2, keep_best=1) as saver:
    assert saver.best() is None
    for step, value in nats.items():
      saver.save(step, tree(step), metric=value)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["2", "6", "7"]  # and nothing that was dropped
  with checkpoint.Checkpointer(tmp_path, keep=2, keep_best=1) as saver:
    assert saver.best() == (2, 1.0)
    assert saver.restore(tree()).step == 7
    best = saver.restore_best(tree())
  assert best.step == 2
  assert_same(best.tree, tree(2))


def test_without_a_metric_there_is_no_best(tmp_path):
  with checkpoint.Checkpointer(tmp_path, keep=1, keep_best=1) as saver:
    saver.save(1, tree(1))
    saver.save(2, tree(2))
    assert saver.restore_best(tree()) is None


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
  release, listing = threading.Event(), checksums.write

  def slow(folder):
    assert release.wait(30)
    listing(folder)

  monkeypatch.setattr(checksums, "write", slow)
  state = {"w": jnp.arange(4096.0)}
  step = jax.jit(lambda state: {"w": state["w"] * 2 + 1}, donate_argnums=0)
  with checkpoint.Checkpointer(tmp_path) as saver:
    saver.save(1, state)
    for _ in range(3):  # the memory that is being written is given away and overwritten
      state = step(state)
    jax.block_until_ready(state)
    assert not (tmp_path / "1").exists()  # no name before it is whole
    release.set()
    saver.wait()
    assert (tmp_path / "1" / checksums.FILE_NAME).exists()
    found = saver.restore({"w": jnp.zeros(4096)}).tree
  np.testing.assert_array_equal(found["w"], np.arange(4096.0))


def largest(folder):
  return max((path for path in (folder / "state").rglob("d/*")), key=lambda p: p.stat().st_size)


def flip(path, at=None):
  content = bytearray(path.read_bytes())
  content[len(content) // 2 if at is None else at] ^= 0x10
  path.write_bytes(content)


def missing(folder):
  largest(folder).unlink()


def truncated(folder):
  os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def changed(folder):
  flip(largest(folder))


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def unlisted(folder):
  (folder / checksums.FILE_NAME).unlink()


def garbled(folder):
  (folder / checksums.FILE_NAME).write_bytes(b"\xff\x00{")


def a_file(folder):
  shutil.rmtree(folder)
  folder.write_text("")


@pytest.mark.parametrize(
  ("harm", "says"),
  [
    (missing, "is missing"),
    (truncated, " bytes of "),
    (changed, "was changed"),
    (empty, "the folder is empty"),
    (unlisted, "never finished"),
    (garbled, "cannot be read"),
    (a_file, "not a folder"),
  ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(harm, says, tmp_path):
  folder = saved(tmp_path / "run")
  harm(folder / "3")
  found, (line,) = opened(folder)
  assert says in line and "checkpoint 3 is damaged" in line and "going on from step 2" in line
  assert "\n" not in line
  assert_same(found.tree, tree(2))
  assert (tmp_path / "run-damaged" / "3").exists() and not (folder / "3").exists()
  with checkpoint.Checkpointer(folder) as saver:  # the step can be saved again
    saver.save(3, tree(3))
  found, lines = opened(folder)
  assert (found.step, lines) == (3, [])


def test_a_changed_byte_is_seen_in_every_file(tmp_path):
  folder = saved(tmp_path / "run", (1,)) / "1"
  assert checksums.damage(folder) is None
  paths = [path for path in folder.rglob("*") if path.is_file()]
  paths.remove(folder / "commit_success.txt")  # only its being there means something
  assert len(paths) > 8
  for path in paths:
    flip(path)
    assert checksums.damage(folder), path
    flip(path)
    assert checksums.damage(folder) is None, path


def test_damage_to_all_starts_from_the_start_and_says_so(tmp_path):
  folder = saved(tmp_path / "run")
  for harm, step in ((missing, "1"), (changed, "2"), (empty, "3")):
    harm(folder / step)
  found, lines = opened(folder)
  assert found is None and len(lines) == 3
  assert "none is left, starting from the start" in lines[-1]


def test_an_older_damaged_checkpoint_does_not_stop_a_run(tmp_path):
  folder = saved(tmp_path / "run")
  missing(folder / "1")
  found, (line,) = opened(folder)
  assert found.step == 3 and "checkpoint 1 is damaged" in line and "step 3" in line


def test_a_damaged_best_checkpoint_is_left_out(tmp_path):
  with checkpoint.Checkpointer(tmp_path / "run", keep=1, keep_best=1) as saver:
    saver.save(1, tree(1), metric=1.0)
    saver.save(2, tree(2), metric=2.0)
  changed(tmp_path / "run" / "1")
  lines = []
  with checkpoint.Checkpointer(tmp_path / "run", keep_best=1, log=lines.append) as saver:
    assert saver.restore(tree()).step == 2
    assert saver.restore_best(tree()) is None
  assert len(lines) == 1 and "checkpoint 1 is damaged" in lines[0]


def test_what_a_killed_save_left_is_named_and_removed(tmp_path):
  folder = saved(tmp_path / "run")
  shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
  found, (line,) = opened(folder)
  assert found.step == 3 and line == "checkpoint 4 was not finished; it is removed"
  assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_another_config_is_refused_with_both_values(tmp_path):
  config = {
    "optimizer": {"steps": 30, "clip": 1.0},
    "mesh": {"data": 1},
    "seed": 0,
    "eval": {"every": 5},
  }
  folder = saved(tmp_path / "run", config=config)
  other = {
    "optimizer": {"steps": 40, "clip": 1.0},
    "mesh": {"data": 4},
    "seed": 1,
    "eval": {"every": 2},
    "checkpoint": {"keep": 9},
  }
  with pytest.raises(errors.UserError) as caught:
    opened(folder, config=other)
  assert "optimizer.steps was 30, is 40; seed was 0, is 1;" in str(caught.value)
  assert not any(name in str(caught.value) for name in ("mesh", "eval", "checkpoint.keep"))
  other.update(optimizer=config["optimizer"], seed=0)  # the mesh and what is asked may differ
  found, lines = opened(folder, config=other)
  assert found.step == 3 and not lines


def test_differences_shorten_what_is_long_and_many():
  stored = {"a": list(range(100)), **{name: 0 for name in "bcdefgh"}}
  told = resume.described(resume.differences(stored, {name: 1 for name in "bcdefgh"}))
  assert "..." in told and told.endswith("; and 2 more") and "h was" not in told


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    errors.UserError, match=r"--workdir: the directory .*cannot be opened \(Not a directory\)"
  ):
    checkpoint.Checkpointer(tmp_path / "file" / "run")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, capfd):
  folder = tmp_path / "run"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  rng = np.random.default_rng(0)  # several arrays: several writes fail
  big = {name: jnp.asarray(rng.normal(size=50_000), jnp.float32) for name in "abcdef"}
  saver = checkpoint.Checkpointer(folder)
  saver.save(1, tree(1))
  saver.wait()
  # A real refusal of the system, at the same place as a full disk: no file above 64 KiB.
  resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
  try:
    with pytest.raises(errors.UserError) as caught, saver:
      saver.save(2, big)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "the checkpoint of step 2 in" in str(caught.value)
  assert "cannot be written (File too large)" in str(caught.value)
  assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err
  assert sorted(path.name for path in folder.iterdir()) == ["1"]
  found, lines = opened(folder)
  assert found.step == 1 and not lines


ELSEWHERE = """
import pathlib, sys
import jax
import ml_collections
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from qlora_jax.training import checkpoint

folder = pathlib.Path(sys.argv[1])
shapes = {"a": ((8, 16), P("x", "y")), "b": ((6,), P()), "c": ((4, 8), P(None, ("x", "y")))}
for step, sizes in ((1, (2, 2)), (2, (4, 1)), (3, (1, 4))):
  mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  like = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
          for name, (shape, spec) in shapes.items()}
  with checkpoint.Checkpointer(folder) as saver:
    found = saver.restore(like)
    assert found.step == step, found.step
    for name, leaf in found.tree.items():
      assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim), name
      assert len(leaf.sharding.device_set) == 4
    saver.save(step + 1, jax.tree.map(lambda leaf: 2 * leaf, found.tree))
"""


def test_one_device_four_devices_on_any_mesh_and_back(tmp_path):
  rng = np.random.default_rng(0)
  first = {
    "a": rng.normal(size=(8, 16)),
    "b": rng.normal(size=6),
    "c": rng.normal(size=(4, 8)),
  }
  first = {name: jnp.asarray(value, jnp.float32) for name, value in first.items()}
  checkpoint.save(tmp_path / "run", 1, first)
  done = subprocess.run(
    [sys.executable, "-c", ELSEWHERE, tmp_path / "run"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  step, last = checkpoint.restore(tmp_path / "run", first)
  assert step == 4
  for name, value in first.items():
    assert last[name].sharding == value.sharding
    np.testing.assert_array_equal(last[name], 8 * value)  # powers of two: no rounding


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("seconds", -1.0, "checkpoint.seconds: -1.0"),
    ("seconds", float("nan"), "checkpoint.seconds"),
    ("keep", 0, "checkpoint.keep: 0 is not at least 1"),
    ("keep_best", -1, "checkpoint.keep_best"),
    ("on_nonfinite", "ignore", "checkpoint.on_nonfinite: 'ignore' is not one of end, stop"),
    ("validate_every", 7, "checkpoint.validate_every: 7 is not a multiple of eval.every = 5"),
  ],
)
def test_a_mistake_in_the_config_is_named(field, value, says):
  fields = {"seconds": 1.0, "keep": 1, "keep_best": 0, "validate_every": 0}
  good = {"checkpoint": fields, "eval": {"every": 5}}
  checkpoint.check_config(ml_collections.ConfigDict(good))
  bad = {"checkpoint": {**fields, field: value}, "eval": {"every": 5}}
  with pytest.raises(errors.UserError) as caught:
    checkpoint.check_config(ml_collections.ConfigDict(bad))
  assert says in str(caught.value)
