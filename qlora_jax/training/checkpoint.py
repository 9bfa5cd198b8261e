"""Saving and restoring trees with Orbax: atomic folders, the newest whole one wins."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from qlora_jax.typing import PyTree


def save(directory: pathlib.Path, step: int, tree: PyTree) -> None:
  """Writes `tree` as `directory/<step>` atomically and removes older steps."""
  with ocp.CheckpointManager(
    directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
  ) as manager:
    manager.save(step, args=ocp.args.StandardSave(tree), force=True)
    manager.wait_until_finished()


def restore(directory: pathlib.Path, like: PyTree) -> tuple[int, PyTree] | None:
  """The newest (step, tree) shaped and placed as `like`, or None where nothing was saved."""
  if not directory.exists():
    return None
  with ocp.CheckpointManager(directory.absolute()) as manager:
    step = manager.latest_step()
    if step is None:
      return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return step, manager.restore(step, args=ocp.args.StandardRestore(target))


@contextlib.contextmanager
def lock(directory: pathlib.Path) -> Iterator[None]:
  """Holds `directory` for this process: others that ask wait, even if the holder is killed."""
  directory.parent.mkdir(parents=True, exist_ok=True)
  with open(directory.with_name(f".{directory.name}.lock"), "w") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file closes
    yield
