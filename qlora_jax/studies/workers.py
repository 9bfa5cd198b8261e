"""Arms of a sweep side by side: worker processes, each on its own core.

The small matrix products of many runs use one core well and two badly, so that W processes of one
thread finish nearly W times as much as one process of W threads. Workers share the work directory
(results, bases, data and compiled programs are guarded by locks) and report to the one display of
the parent. This module imports no JAX: a worker binds to its core before anything starts threads.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from qlora_jax import errors
from qlora_jax.training import progress, stop

_STATE: Any = None  # what `setup` built in this worker


def default_count() -> int:
  """One worker per core that this process may use, at most eight."""
  return min(8, len(os.sched_getaffinity(0)))


def run(
  setup: Callable,
  setup_args: tuple,
  work: Callable,
  jobs: list,
  count: int,
  display: progress.Display,
) -> Iterator[tuple[int, Any]]:
  """Yields (index, work(state, job)) as jobs finish, in any order.

  Args:
    setup: `setup(display, *setup_args)` builds the state of a process, once.
    setup_args: picklable.
    work: `work(state, job)`, a function of a module.
    jobs: picklable.
    count: processes; with 1 everything runs in this one, in order.
    display: where all progress is shown.

  Raises:
    what `work` raised first; a UserError if a worker was killed.
  """
  count = min(count, len(jobs))
  if count <= 1:
    state = setup(display, *setup_args)
    for index, job in enumerate(jobs):
      yield index, work(state, job)
    return
  context = multiprocessing.get_context("spawn")
  events, cores = context.Queue(), context.Queue()
  for core in sorted(os.sched_getaffinity(0))[:count]:
    cores.put(core)
  shower = threading.Thread(target=_show, args=(events, display), daemon=True)
  shower.start()
  executor = futures.ProcessPoolExecutor(
    count, context, initializer=_start, initargs=(cores, events, setup, setup_args)
  )
  # A terminal interrupts all processes, a scheduler the parent alone: the workers hear of both.
  stop.on_request(lambda: _pass_on(executor))
  try:
    pending = {executor.submit(_work, work, job): index for index, job in enumerate(jobs)}
    for future in futures.as_completed(pending):
      yield pending[future], future.result()
  except futures.process.BrokenProcessPool as error:
    raise errors.UserError(
      "workers: a worker process was killed (out of memory?); the same command continues, with"
      " --workers=1 in less memory"
    ) from error
  finally:
    # Jobs that wait are dropped; running ones were interrupted with us and have saved.
    executor.shutdown(wait=True, cancel_futures=True)
    events.put(None)
    shower.join(timeout=5)


def _pass_on(executor: futures.ProcessPoolExecutor) -> None:
  for process in list((executor._processes or {}).values()):
    with contextlib.suppress(ProcessLookupError):
      os.kill(process.pid, signal.SIGTERM)


def _start(cores, events, setup: Callable, setup_args: tuple) -> None:
  global _STATE
  with contextlib.suppress(queue.Empty):
    os.sched_setaffinity(0, {cores.get(timeout=5)})
  stop.install(patient=True)
  _STATE = setup(_Remote(events), *setup_args)


def _work(work: Callable, job: Any) -> Any:
  return work(_STATE, job)


class _Remote:
  """A worker's side of the display: the methods that a loop uses, sent to the parent."""

  def __init__(self, events):
    self._events = events
    self._cohorts = 0

  @contextlib.contextmanager
  def cohort(self, name: str, num_trials: int, total_steps: int, start_step: int = 0):
    self._cohorts += 1
    key = (os.getpid(), self._cohorts)
    self._events.put(("start", key, (name, num_trials, total_steps, start_step)))
    try:
      yield _RemoteCohort(self._events, key)
    except BaseException:
      self._events.put(("failed", key, ()))
      raise
    self._events.put(("done", key, ()))

  def skip(self, name: str, num_trials: int) -> None:
    self._events.put(("skip", None, (name, num_trials)))

  def log(self, text: str) -> None:
    self._events.put(("log", None, (text,)))


class _RemoteCohort:
  def __init__(self, events, key):
    self._events, self._key = events, key

  def update(self, step: int, loss: Any = None, rate: Any = None) -> None:
    loss, rate = (None if value is None else float(value) for value in (loss, rate))
    self._events.put(("update", self._key, (step, loss, rate)))

  def note(self, text: str) -> None:
    self._events.put(("note", self._key, (text,)))


class _Stopped(Exception):
  """Ends the display of a cohort whose worker failed."""


def _show(events, display: progress.Display) -> None:
  """Plays the workers' events on the display until None comes."""
  shown: dict[tuple, tuple] = {}
  while (event := events.get()) is not None:
    kind, key, args = event
    if kind == "start":
      manager = display.cohort(*args)
      shown[key] = (manager, manager.__enter__())
    elif kind == "done":
      shown.pop(key)[0].__exit__(None, None, None)
    elif kind == "failed":
      with contextlib.suppress(_Stopped):
        shown.pop(key)[0].__exit__(_Stopped, _Stopped(), None)
    elif kind in ("update", "note"):
      getattr(shown[key][1], kind)(*args)
    else:
      getattr(display, kind)(*args)
