"""Scalars of a run on disk: one JSON line a write, and the same values as TensorBoard events.

`metrics.jsonl` is the record that the code reads back; the TensorBoard files beside it are for
looking at. A run that resumes from a checkpoint first calls `truncate`, so that no step is there
twice.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from qlora_jax import errors, files

FILE_NAME = "metrics.jsonl"

_RESERVED = ("step", "run")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
  """Appends scalars to `<directory>/metrics.jsonl` and to TensorBoard event files.

  Used as a context manager. Opening an existing directory appends to it; a last line that an
  earlier process did not finish writing is dropped.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    self._directory = pathlib.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self.path = self._directory / FILE_NAME
    if self.path.exists() and not _ends_with_newline(self.path):
      _rewrite(self.path, _whole_lines(self.path))
    self._file: IO[str] = self.path.open("a", encoding="utf-8")
    self._events = self._open_events()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def write(self, step: int, scalars: Mapping[str, float], run: str | None = None) -> None:
    """Records `scalars` (slash path to value) at `step`.

    Args:
      step: the training step that the values belong to.
      scalars: values by slash path, such as `train/loss`; anything `float` accepts.
      run: label of one point of a sweep that trains several at once. TensorBoard then gets the
        tag `<path>/<run>`, so that the points of one metric share a chart group; characters
        that TensorBoard does not allow in a tag, such as `=`, become `_` there.

    Raises:
      ValueError: a scalar is named `step` or `run`.
    """
    record: dict[str, Any] = {"step": int(step)}
    if run is not None:
      record["run"] = run
    for name, value in scalars.items():
      if name in _RESERVED:
        raise ValueError(f"A scalar cannot be named {name!r}: the record uses that key itself.")
      value = float(value)
      record[name] = value if math.isfinite(value) else str(value)
      tag = name if run is None else f"{name}/{run}"
      with _silenced(not math.isfinite(value)):
        self._events.add_scalar(tag, value, int(step))
    self._file.write(json.dumps(record, allow_nan=False) + "\n")

  def truncate(self, step: int) -> None:
    """Drops what was recorded after `step`: the run resumes from a checkpoint at `step`.

    The JSON file is replaced in one move. TensorBoard hides the later events by the new event file.
    """
    self._file.close()
    kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
    _rewrite(self.path, kept)
    self._file = self.path.open("a", encoding="utf-8")
    self._events.close()
    self._events = self._open_events(purge_step=step + 1)

  def flush(self) -> None:
    """Hands everything written so far to the operating system."""
    self._file.flush()
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes both records; a second call does nothing."""
    if not self._file.closed:
      self._file.close()
      self._events.close()

  def _open_events(self, purge_step: int | None = None):
    # The library names a file by the second and overwrites an equal name, hence the suffix.
    return _tensorboardx().SummaryWriter(
      logdir=str(self._directory),
      purge_step=purge_step,
      filename_suffix=f".{os.getpid()}.{time.monotonic_ns()}",
    )


def _tensorboardx():
  """The module, loaded without torch: it would import it, for tensors that are never given here."""
  hidden = "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None
  try:
    import tensorboardX
  finally:
    if hidden:
      del sys.modules["torch"]
  return tensorboardX


@contextlib.contextmanager
def _silenced(silent: bool) -> Iterator[None]:
  """Holds back tensorboardX's warning of each NaN: a trial that diverges is recorded as such."""
  logger = logging.getLogger("tensorboardX.x2num")
  before, logger.disabled = logger.disabled, silent or logger.disabled
  try:
    yield
  finally:
    logger.disabled = before


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The records of a `metrics.jsonl`, or of the directory that holds one, in order.

  Non-finite values come back as floats. An unfinished last line is left out.

  Raises:
    UserError: there is no such file, or a line other than the last is not a record.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / FILE_NAME
  if not path.is_file():
    raise errors.UserError(f"{path}: no such file; give a run's directory or its {FILE_NAME}.")
  return [
    {key: value if key == "run" else _restore(value) for key, value in json.loads(line).items()}
    for line in _whole_lines(path)
  ]


def _restore(value: Any) -> Any:
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _whole_lines(path: pathlib.Path) -> list[str]:
  """The file's finished lines, each checked to be a record with a step."""
  lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
  del lines[-1]  # empty after a final newline, otherwise what a killed process left unfinished
  for number, line in enumerate(lines, start=1):
    try:
      is_record = isinstance(json.loads(line)["step"], int)
    except (ValueError, TypeError, KeyError):
      is_record = False
    if not is_record:
      if number == len(lines):
        return lines[:-1]
      raise errors.UserError(
        f"{path}: line {number} is not a JSON object with an integer 'step'; remove that line."
      )
  return lines


def _rewrite(path: pathlib.Path, lines: list[str]) -> None:
  files.write_text(path, "".join(line + "\n" for line in lines))


def _ends_with_newline(path: pathlib.Path) -> bool:
  with path.open("rb") as file:
    if file.seek(0, os.SEEK_END) == 0:
      return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
