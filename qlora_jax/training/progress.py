"""What a sweep shows while it runs: bars on a terminal, plain lines everywhere else.

A sweep has trials, one per trial; a cohort is trials that train together. A terminal gets one bar
for the trials and one for the steps of every cohort that trains now. A log file, a pipe or a dumb
terminal gets a line at the start and end of a cohort and one every few seconds in between, without
control characters.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import rich.console
import rich.live
import rich.progress
import rich.text

_LIVE_SECONDS = 0.1  # a bar needs no newer numbers than this


class Cohort:
  """Points that train together now. Made by `Display.cohort`."""

  def __init__(
    self, display: "Display", name: str, num_trials: int, total_steps: int, start_step: int
  ):
    self.name = name
    self.num_trials = num_trials
    self.total_steps = total_steps
    self.start_step = start_step
    self.step = start_step
    self._display = display
    self._began = self._shown = display._clock()
    self._first: tuple[float, int] | None = None  # time and step of the first update
    self._values = ""
    self._task: rich.progress.TaskID | None = None  # its bar

  def update(self, step: int, loss: Any = None, rate: Any = None) -> None:
    """Reports that `step` steps are done.

    Cheap enough for every step: `loss` and `rate` (units a second) may be device arrays, and are
    read only when they are about to be shown.
    """
    now = self._display._clock()
    self.step = step
    if self._first is None:
      self._first = (now, step)
    if now - self._shown < self._display._every_seconds:
      return
    self._shown = now
    parts = [] if loss is None else [f"loss {float(loss):.4g}"]
    if rate is not None:
      parts.append(f"{_si(float(rate))} {self._display._unit}/s")
    self._values = ", ".join(parts)
    self._display._show(self)

  def note(self, text: str) -> None:
    """Prints a line that stays, such as an evaluation's result."""
    self._display.log(f"{self.name}, step {self.step}: {text}")

  def seconds_left(self) -> float | None:
    """Time to the last step at the pace since the first update, which leaves compiling out."""
    if self._first is None or self.step <= self._first[1]:
      return None
    pace = (self._display._clock() - self._first[0]) / (self.step - self._first[1])
    return pace * (self.total_steps - self.step)

  def _fraction(self, steps: int) -> float:
    return min(1.0, steps / self.total_steps) if self.total_steps else 1.0


class Display:
  """Shows how far a sweep is. A context manager; leaving it restores the terminal.

  Args:
    total_trials: the sweep's trials, finished ones included.
    earlier_trials: how many of them an earlier process finished, each to be told by `skip`; the
      time left leaves them out from the beginning.
    unit: what `rate` counts: `examples`, `tokens`.
    stream: where to write; standard error by default.
    plain: True for lines, False for bars; None decides by whether `stream` is a terminal.
    every_seconds: the least time between two plain lines of a cohort.
    clock: seconds, monotonic; tests set it.
  """

  def __init__(
    self,
    total_trials: int,
    unit: str = "examples",
    stream: TextIO | None = None,
    plain: bool | None = None,
    every_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    earlier_trials: int = 0,
  ):
    self._stream = sys.stderr if stream is None else stream
    self._plain = _is_plain(self._stream) if plain is None else plain
    self._unit = unit
    self._every_seconds = every_seconds if self._plain else _LIVE_SECONDS
    self._clock = clock
    self._total_trials = total_trials
    self._earlier = earlier_trials
    self._trials = 0  # finished, earlier ones included
    self._work = 0.0  # trials trained by this process, parts of trials included
    self._began = clock()
    self._live: rich.live.Live | None = None
    self._active: list[Cohort] = []

  def __enter__(self) -> "Display":
    self._began = self._clock()
    if not self._plain:
      self._start_live()
    return self

  def __exit__(self, *exc_info) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  @contextlib.contextmanager
  def cohort(
    self, name: str, num_trials: int, total_steps: int, start_step: int = 0
  ) -> Iterator[Cohort]:
    """Shows one cohort while the body runs.

    `start_step` is above zero for a cohort that resumes. The cohort's trials count as finished
    only when the body ends without an exception.
    """
    cohort = Cohort(self, name, num_trials, total_steps, start_step)
    resumed = f", from step {start_step}" if start_step else ""
    trials = _count(num_trials, "trial") if num_trials else "preparation"
    if self._plain and num_trials:  # what comes before the trials is shown where it takes long
      self._line(f"{name}: {trials}, {_count(total_steps, 'step')}{resumed}")
    elif not self._plain:
      cohort._task = self._cohort_bar.add_task(
        f"{name} ({trials}{resumed})", total=total_steps, completed=start_step, left="", values=""
      )
    self._active.append(cohort)
    try:
      yield cohort
      self._active.remove(cohort)
      self._trials += num_trials
      self._work += num_trials * cohort._fraction(total_steps - start_step)
      took = _duration(self._clock() - cohort._began)
      if num_trials:
        self.log(f"{name}: done in {took} ({self._overall()})")
    finally:
      if cohort in self._active:
        self._active.remove(cohort)
      if not self._plain:
        self._cohort_bar.remove_task(cohort._task)
        self._refresh_overall()

  def skip(self, name: str, num_trials: int) -> None:
    """Counts a cohort that an earlier process finished."""
    self._trials += num_trials
    self._earlier = max(0, self._earlier - num_trials)
    self.log(f"{name}: {_count(num_trials, 'trial')} finished earlier")
    self._refresh_overall()

  def log(self, text: str) -> None:
    """Prints one line that stays; above the bars on a terminal."""
    if self._live is None:
      self._line(text)
    else:
      self._live.console.print(rich.text.Text(_clean(text)), soft_wrap=True)

  def _show(self, cohort: Cohort) -> None:
    left = cohort.seconds_left()
    if self._plain:
      percent = round(100 * cohort._fraction(cohort.step))
      parts = [f"{cohort.name}: step {cohort.step}/{cohort.total_steps} ({percent} %)"]
      parts += [cohort._values] if cohort._values else []
      parts += [f"{_duration(left)} left"] if left is not None else []
      parts += [self._overall()]
      self._line(", ".join(parts))
    elif self._live is not None:
      self._cohort_bar.update(
        cohort._task,
        completed=cohort.step,
        values=cohort._values,
        left="" if left is None else f"{_duration(left)} left",
      )
      self._refresh_overall()

  def _overall(self) -> str:
    left = self._seconds_left()
    tail = "" if left is None else f", {_duration(left)} left in all"
    return f"{self._trials} of {_count(self._total_trials, 'trial')}{tail}"

  def _seconds_left(self) -> float | None:
    """Time to the last trial, if those to come take as long as those this process trained."""
    done, work = float(self._trials + self._earlier), self._work
    for cohort in self._active:
      done += cohort.num_trials * cohort._fraction(cohort.step)
      work += cohort.num_trials * cohort._fraction(cohort.step - cohort.start_step)
    if work <= 0 or done >= self._total_trials:
      return None
    return (self._clock() - self._began) / work * (self._total_trials - done)

  def _line(self, text: str) -> None:
    self._stream.write(_clean(text) + "\n")
    self._stream.flush()

  def _start_live(self) -> None:
    console = rich.console.Console(file=self._stream, force_terminal=True, highlight=False)
    # Plain text columns: a name with square brackets in it is not markup.
    name = rich.progress.TextColumn("{task.description}", markup=False)
    left = rich.progress.TextColumn("{task.fields[left]}", markup=False)
    values = rich.progress.TextColumn("{task.fields[values]}", markup=False)
    self._overall_bar = rich.progress.Progress(
      name, rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), left, console=console
    )
    self._cohort_bar = rich.progress.Progress(
      name,
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      values,
      left,
      console=console,
    )
    self._overall_task = self._overall_bar.add_task("trials", total=self._total_trials, left="")
    bars = rich.console.Group(self._overall_bar, self._cohort_bar)
    self._live = rich.live.Live(bars, console=console, refresh_per_second=8)
    self._live.start()

  def _refresh_overall(self) -> None:
    if self._live is None:
      return
    left = self._seconds_left()
    self._overall_bar.update(
      self._overall_task,
      completed=self._trials,
      left="" if left is None else f"{_duration(left)} left in all",
    )


def _is_plain(stream: TextIO) -> bool:
  try:
    is_terminal = stream.isatty()
  except (AttributeError, ValueError):
    is_terminal = False
  return not is_terminal or os.environ.get("TERM", "dumb") == "dumb"


def _clean(text: str) -> str:
  """One line without control characters."""
  return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(max(0.0, seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _si(value: float) -> str:
  """Three significant digits with a thousands suffix: 950, 12.3k, 4.56M."""
  for suffix in ("", "k", "M"):
    if abs(value) < 999.5:
      return f"{value:.3g}{suffix}"
    value /= 1000
  return f"{value:.3g}G"
