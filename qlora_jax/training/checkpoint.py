"""Saving and restoring trees with Orbax: atomic folders, the newest whole one wins."""

import pathlib

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
