"""Checkpoints of a run, written by Orbax: asynchronous, atomic, checked before they are used.

    <directory>/<step>/state      the tree: adapter, optimiser, step
    <directory>/<step>/extra      JSON: the config, the data iterator, what the loop remembers
    <directory>/<step>/metrics    the number that the best checkpoints are kept by
    <directory>/<step>/checksums.json
    <directory>-damaged/<step>    what was found damaged, moved here

In a run of several processes all of them call every method, at the same steps; the directory is on
a file system that they share.
"""

import contextlib
import errno
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from qlora_jax import errors
from qlora_jax.training import checksums, resume
from qlora_jax.typing import PyTree

ON_NONFINITE = ("end", "stop")
_METRIC = "validation/nats"
_TEMPORARY = ".orbax-checkpoint-tmp"
_TRASH = "trash"  # dropped steps are renamed into it first: a half-deleted one looks damaged
# The user's to mend; any other failure to write is a fault of the program.
_WRITE_FAILURES = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ENOTDIR,
  errno.EEXIST,
  errno.ENOENT,
  errno.ESTALE,
)


class Restored(NamedTuple):
  """A checkpoint that was read: its step, its tree, and the JSON kept beside it."""

  step: int
  tree: PyTree
  extra: dict[str, Any]


class Checkpointer:
  """The checkpoints in one directory; a context manager that leaves none half-written.

  Opening it looks the directory over: what a killed process left unfinished is removed, what is
  damaged is moved aside, and each is named in one line.

  Args:
    directory: made where it is missing.
    keep: newest checkpoints that are kept.
    keep_best: checkpoints of the least metric that are kept beside them.
    config: plain, stored in every checkpoint; a checkpoint of another config is refused.
    log: shows a line to the user.

  Raises:
    errors.UserError: the directory cannot be written.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep: int = 2,
    keep_best: int = 0,
    config: dict[str, Any] | None = None,
    log: Callable[[str], None] = print,
  ):
    self.directory, self.config, self._log = directory.absolute(), config, log
    self._pending: int | None = None  # the step that may still be on its way to the disk
    _quieten()
    with self._told("directory", "opened"):
      self.directory.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        self._survey()
      _wait_for_all("checkpoints surveyed")
      managers = ocp.checkpoint_managers
      policies = [managers.LatestN(keep)]
      if keep_best:
        policies.append(
          managers.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC],
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
          )
        )
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=managers.AnyPreservationPolicy(policies),
          best_fn=(lambda metrics: metrics[_METRIC]) if keep_best else None,
          best_mode="min",
          todelete_subdir=_TRASH,
          # Orbax calls this when all processes have written and the step has no name yet.
          async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        ),
      )
    self._keep_best = keep_best

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if error is None:
      self.close()
      return
    with contextlib.suppress(Exception):  # the error on its way out says more
      self.close()

  def restore(self, like: PyTree) -> Restored | None:
    """The newest checkpoint, shaped and placed as `like`; None where there is none.

    The tree may be sharded over another number of devices or processes than when it was saved.

    Args:
      like: arrays, or `jax.ShapeDtypeStruct`s with a sharding.

    Raises:
      errors.UserError: it was saved with another config; every field is named with both values.
    """
    step = self._manager.latest_step()
    return None if step is None else self._read(step, like)

  def best(self) -> tuple[int, float] | None:
    """(Step, metric) of the best checkpoint that is kept; None where none has a metric."""
    step = self._manager.best_step() if self._keep_best else None
    if step is None:
      return None
    value = float(self._manager.metrics(step)[_METRIC])
    return (step, value) if math.isfinite(value) else None

  def restore_best(self, like: PyTree) -> Restored | None:
    """As `restore`, for the best checkpoint; None where there is none, or it is damaged."""
    self.wait()
    best = self.best()
    if best is None:
      return None
    path = self.directory / str(best[0])
    if jax.process_index() == 0 and (reason := checksums.damage(path)):
      self._log(f"{self._set_aside(path, reason)}; there is no best one")
    _wait_for_all("best checkpoint checked")
    return self._read(best[0], like) if path.exists() else None

  def save(
    self, step: int, tree: PyTree, extra: dict[str, Any] | None = None, metric: float | None = None
  ) -> None:
    """Starts writing a checkpoint; returns when the tree may be donated.

    It waits for the one before to be whole, which is then the newest until this one is.

    Args:
      step: above every step saved so far.
      tree: of arrays, sharded or not, random keys among them.
      extra: JSON.
      metric: the less the better; None where it was not measured.

    Raises:
      errors.UserError: this one or the one before cannot be written; older ones are as they were.
    """
    self.wait()
    self._pending = step
    metrics = None
    if self._keep_best:
      known = metric is not None and math.isfinite(metric)
      metrics = {_METRIC: float(metric) if known else math.inf}
    with self._told(f"checkpoint of step {step}", "written"):
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(tree),
        extra=ocp.args.JsonSave({"config": self.config, **(extra or {})}),
      )
      self._manager.save(step, args=items, metrics=metrics, force=True)

  def wait(self) -> None:
    """Returns when everything saved is on the disk; raises as `save` does."""
    with self._told(f"checkpoint of step {self._pending}", "written"):
      self._manager.wait_until_finished()
    self._pending = None
    self._empty_trash()

  def close(self) -> None:
    """Waits for pending writes, then closes the manager."""
    try:
      self.wait()
    except BaseException:
      with contextlib.suppress(Exception):  # it tells of what failed once more
        self._manager.close()
      if jax.process_index() == 0:
        self._remove_unfinished()
      raise
    self._manager.close()

  def _read(self, step: int, like: PyTree) -> Restored:
    items = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
    stored = items["extra"].pop("config")
    if self.config is not None and stored is not None:
      differing = resume.differences(stored, self.config, resume.RUN)
      if differing:
        raise errors.UserError(
          f"--config: the checkpoint {self.directory / str(step)} is of another config:"
          f" {resume.described(differing)}; give the old values or another directory"
        )
    target = ocp.args.StandardRestore(jax.tree.map(_abstract, like))
    tree = self._manager.restore(step, args=ocp.args.Composite(state=target))["state"]
    return Restored(step, tree, items["extra"])

  def _survey(self) -> None:
    """Removes what was not finished, moves aside what is damaged, says what is used instead."""
    self._empty_trash()
    for path in self.directory.glob(f"*{_TEMPORARY}*"):
      self._log(f"checkpoint {path.name.split('.')[0]} was not finished; it is removed")
      shutil.rmtree(path, ignore_errors=True)
    steps = [path for path in self.directory.iterdir() if path.name.isdecimal()]
    newest, lines = None, []
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
      # Older ones are read when they are needed: to look whether they are all there is enough.
      reason = checksums.damage(path, contents=newest is None)
      if reason:
        lines.append(self._set_aside(path, reason))
      elif newest is None:
        newest = path.name
    if lines:
      then = f"going on from step {newest}" if newest else "none is left, starting from the start"
      lines[-1] += f"; {then}"
    for line in lines:
      self._log(line)

  def _set_aside(self, path: pathlib.Path, reason: str) -> str:
    folder = self.directory.with_name(f"{self.directory.name}-damaged")
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while target.exists():
      target, number = folder / f"{path.name}-{number}", number + 1
    path.rename(target)
    return f"checkpoint {path.name} is damaged ({reason}) and moved to {target}"

  def _seal(self) -> None:
    (folder,) = self.directory.glob(f"{self._pending}{_TEMPORARY}*")
    checksums.write(folder)

  def _empty_trash(self) -> None:
    if jax.process_index() == 0:
      shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

  @contextlib.contextmanager
  def _told(self, what: str, done: str) -> Iterator[None]:
    """Turns a disk that is full or closed to us into one line."""
    try:
      yield
    except errors.UserError:
      raise
    except Exception as error:
      reason = write_failure(error)
      if reason is None:
        raise
      if jax.process_index() == 0:
        self._remove_unfinished()
      raise errors.UserError(
        f"--workdir: the {what} in {self.directory} cannot be {done} ({reason}); make room or use"
        " another directory: the same command resumes from the previous checkpoint"
      ) from error

  def _remove_unfinished(self) -> None:
    """Makes room: what is unfinished is of no use. Other writers of it may still be at work."""
    absent = 0
    for _ in range(100):
      unfinished = list(self.directory.glob(f"*{_TEMPORARY}*"))
      absent = 0 if unfinished else absent + 1
      if absent == 5:
        return
      for path in unfinished:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.02)


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError that names the first field of `config.checkpoint` that is wrong."""
  fields = config.checkpoint
  if not 0 <= fields.seconds < math.inf:
    raise errors.UserError(f"checkpoint.seconds: {fields.seconds} is not a time of at least 0")
  if fields.keep < 1:
    raise errors.UserError(f"checkpoint.keep: {fields.keep} is not at least 1")
  if fields.get("keep_best", 0) < 0:
    raise errors.UserError(f"checkpoint.keep_best: {fields.keep_best} is not at least 0")
  choice = fields.get("on_nonfinite", "end")
  if choice not in ON_NONFINITE:
    raise errors.UserError(
      f"checkpoint.on_nonfinite: {choice!r} is not one of {', '.join(ON_NONFINITE)}"
    )
  every = fields.get("validate_every", 0)
  if every < 0 or every % config.eval.every:
    raise errors.UserError(
      f"checkpoint.validate_every: {every} is not a multiple of eval.every = {config.eval.every}"
    )


def save(directory: pathlib.Path, step: int, tree: PyTree) -> None:
  """Writes `tree` as the one checkpoint of `directory`; returns when it is on the disk."""
  with Checkpointer(directory, keep=1) as saver:
    saver.save(step, tree)


def restore(
  directory: pathlib.Path, like: PyTree, log: Callable[[str], None] = print
) -> tuple[int, PyTree] | None:
  """The newest (step, tree) shaped and placed as `like`, or None where nothing was saved."""
  if not directory.exists():
    return None
  with Checkpointer(directory, log=log) as saver:
    restored = saver.restore(like)
    return restored and (restored.step, restored.tree)


def agree(*numbers: int) -> tuple[int, ...]:
  """The greatest of each number over all processes, which all call it at the same step."""
  if jax.process_count() == 1:
    return numbers
  every = multihost_utils.process_allgather(np.array(numbers, np.int32))
  return tuple(int(value) for value in np.max(every, axis=0))


def write_failure(error: BaseException) -> str | None:
  """Why a file could not be written, where that is the user's to mend; else None."""
  number = error.errno if isinstance(error, OSError) else None
  # TensorStore raises a ValueError that holds the number as text.
  written = re.search(r"os_error_code='(\d+)'", str(error))
  number = int(written[1]) if written else number
  return os.strerror(number) if number in _WRITE_FAILURES else None


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, type and place of a leaf; one that says no place goes to the first device."""
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _wait_for_all(what: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _quieten() -> None:
  """Suppresses the tracebacks that other threads print after a failed write.

  Orbax raises the first failure and closes its event loop, which TensorStore then still tells of
  the others: a traceback each, through `sys.unraisablehook`. Once per process, from the first
  `Checkpointer` on: the threads outlive it.
  """
  if getattr(sys.unraisablehook, "quiet", False):
    return
  before = sys.unraisablehook

  def hook(raised):
    if raised.exc_type is not RuntimeError or str(raised.exc_value) != "Event loop is closed":
      before(raised)

  hook.quiet = True
  sys.unraisablehook = hook
  logging.getLogger("absl").addFilter(_NotFromOrbax())
  logging.getLogger("asyncio").addFilter(_NotOrphaned())


class _NotFromOrbax(logging.Filter):
  """Orbax prints the traceback of every failure that it raises as well."""

  def filter(self, record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL or f"{os.sep}orbax{os.sep}" not in record.pathname


class _NotOrphaned(logging.Filter):
  """asyncio prints the traceback of every write of a failed checkpoint beside the first, raised."""

  def filter(self, record: logging.LogRecord) -> bool:
    error = record.exc_info and record.exc_info[1]
    return not (isinstance(error, Exception) and write_failure(error))
