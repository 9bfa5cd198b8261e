"""Stopping on request: a signal sets a flag, and the loop saves and ends after its next update.

An exception raised by a signal handler could interrupt the writing of a checkpoint. A flag that the
loop reads cannot.
"""

import signal
from collections.abc import Callable

_requested: int | None = None
_listeners: list[Callable[[], None]] = []


class Stopped(KeyboardInterrupt):
  """Raised by the loop once it has saved; `args[0]` is the signal's number."""


def install(patient: bool = False, also: tuple[int, ...] = ()) -> None:
  """Makes SIGINT and SIGTERM requests to stop; call it in the main thread.

  Args:
    patient: whether a second SIGINT is ignored as well; otherwise it interrupts at once.
    also: more signals, of a scheduler.
  """
  for number in (signal.SIGINT, signal.SIGTERM, *also):
    signal.signal(number, _note_patiently if patient else _note)


def requested() -> int | None:
  """The signal that asked to stop, or None."""
  return _requested


def check() -> None:
  """Raises `Stopped` if a stop was requested; for moments when nothing needs saving."""
  if _requested is not None:
    raise Stopped(_requested)


def exit_code(error: KeyboardInterrupt) -> int:
  """128 + the signal: 130 after SIGINT, 143 after SIGTERM."""
  number = error.args[0] if error.args else signal.SIGINT
  return 128 + int(number)


def on_request(listener: Callable[[], None]) -> None:
  """Calls `listener` when a stop is requested, to pass it on to other processes."""
  _listeners.append(listener)


def _note_patiently(number: int, frame) -> None:
  del frame
  global _requested
  _requested = _requested or number
  for listener in _listeners:
    listener()


def _note(number: int, frame) -> None:
  if _requested is not None and number == signal.SIGINT:
    raise KeyboardInterrupt
  _note_patiently(number, frame)
