"""The state of each arm in a work directory: running, done, stopped or failed.

  DIR/arms.json        the arms in their order
  DIR/arms/KEY.json    the last record of the process that trains an arm

The files can be read on any host, without the config and without a scheduler.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import signal
import socket
from collections.abc import Iterator

import ml_collections

from qlora_jax import errors, files
from qlora_jax.training import stop

LIST = "arms.json"
FOLDER = "arms"
COHORTS = "cohorts"  # a folder per cohort, with its result
# Where a trial runs and how it is saved do not change its result.
_NOT_COMPARED = ("cluster", "mesh", "checkpoint")  # nor is `data.data_dir`
_RATE = "learning_rate"


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm: the points of a sweep that differ only in learning rate and seed.

  Attributes:
    key: names its record and its job.
    name: what distinguishes it from the other arms, for people.
    trials: how many trials it has, search and final ones.
  """

  key: str
  name: str
  trials: int


@dataclasses.dataclass
class Record:
  """The record of an arm.

  Attributes:
    state: 'running', 'stopped' (saved; the same command continues), 'failed' or 'done'.
    reason: of 'stopped' and 'failed', one line.
    cohorts: folders below `cohorts/` that hold its results, in order.
    cohort: the one that trains now, and its number of steps.
    host, pid: of the process; `started` distinguishes it from a later process with the same pid.
    started: the process's start in clock ticks since the host's boot, from /proc.
    job: its Slurm job, or None.
    devices: what it trained on.
    began, ended: UTC, ISO 8601.
  """

  state: str
  reason: str = ""
  cohorts: list[str] = dataclasses.field(default_factory=list)
  cohort: str = ""
  steps: int = 0
  host: str = ""
  pid: int = 0
  started: str = ""
  job: str | None = None
  devices: str = ""
  began: str = ""
  ended: str = ""


def key(config: ml_collections.ConfigDict, rates: list[float]) -> str:
  """A hash of everything in which arms differ."""
  plain = config.to_dict()
  for name in _NOT_COMPARED:
    plain.pop(name, None)
  plain["optimizer"].pop(_RATE), plain["data"].pop("data_dir", None)
  text = json.dumps([plain, rates], sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def names(points: list[dict]) -> list[str]:
  """The fields in which each arm differs from the others, as text, in the order of `study.expand`.

  Fields that all points share are left out, and so is the learning rate.
  """
  arms: dict[str, dict] = {}
  for point in points:
    fields = {name: value for name, value in point.items() if name != f"optimizer.{_RATE}"}
    arms.setdefault(json.dumps(fields, sort_keys=True), fields)
  arm_fields = list(arms.values())
  every = dict.fromkeys(name for fields in arm_fields for name in fields)
  varied = [
    name
    for name in every
    if len({json.dumps(fields.get(name), default=list) for fields in arm_fields}) > 1
  ] or list(every)
  return [
    " ".join(f"{name}={fields[name]}" for name in varied if name in fields) or "the config's own"
    for fields in arm_fields
  ]


def write_list(workdir: pathlib.Path, arms: list[Arm]) -> None:
  """Stores the arms of a sweep, in order."""
  files.write_json(workdir / LIST, [dataclasses.asdict(arm) for arm in arms])


def read_list(workdir: pathlib.Path) -> list[Arm]:
  """The arms of a sweep.

  Raises:
    errors.UserError: the directory holds no run.
  """
  path = workdir / LIST
  if not path.exists():
    raise errors.UserError(
      f"--workdir: {workdir} holds no run; give the directory of a run or sweep that was started"
    )
  return [Arm(**fields) for fields in json.loads(path.read_text())]


def read(workdir: pathlib.Path, arm: Arm) -> Record | None:
  """The record of an arm, or None if nothing has trained it yet.

  An arm whose results were removed since is not done.
  """
  path = workdir / FOLDER / f"{arm.key}.json"
  if not path.exists():
    return None
  record = Record(**json.loads(path.read_text()))
  if record.state == "done" and not all(
    (workdir / COHORTS / cohort / "result.json").exists() for cohort in record.cohorts
  ):
    return None
  return record


def alive(record: Record) -> bool | None:
  """Whether the process of a record still runs; None if it is another host's."""
  if record.host != socket.gethostname():
    return None
  return _start_time(record.pid) == record.started


@contextlib.contextmanager
def kept(
  workdir: pathlib.Path, arm_key: str, devices: str = "", first: bool = True
) -> Iterator["Keeper"]:
  """Writes an arm's record while its body trains it, and how that ended.

  Args:
    workdir, arm_key: which record.
    devices: what it trains on.
    first: whether this is the first of several processes; the others write failures only.
  """
  path = workdir / FOLDER / f"{arm_key}.json"
  path.parent.mkdir(exist_ok=True)
  keeper = Keeper(
    path,
    first,
    Record(
      "running",
      host=socket.gethostname(),
      pid=os.getpid(),
      started=_start_time(os.getpid()),
      job=job_id(),
      devices=devices,
      began=_now(),
    ),
  )
  try:
    yield keeper
  except stop.Stopped as stopped:
    keeper.end("stopped", f"stopped by {signal.Signals(stopped.args[0]).name} after saving")
    raise
  except KeyboardInterrupt:
    keeper.end("stopped", "interrupted")
    raise
  except errors.UserError as error:
    keeper.end("failed", str(error))
    raise
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keeper.end("failed", ": ".join([type(error).__name__, *lines[:1]]))
    raise
  keeper.end("done")


class Keeper:
  """Keeps one record; an arm that is found done already keeps the record of its training."""

  def __init__(self, path: pathlib.Path, first: bool, record: Record):
    self._path, self._first, self.record = path, first, record

  def start(self, cohort: str, steps: int) -> None:
    """Notes the cohort that trains next."""
    self.record.cohort, self.record.steps = cohort, steps
    if self._first:
      files.write_json(self._path, dataclasses.asdict(self.record), every_process=True)

  def result(self, cohort: str) -> None:
    """Notes a cohort whose result is stored."""
    self.record.cohorts.append(cohort)

  def end(self, state: str, reason: str = "") -> None:
    """Notes how the training ended."""
    if state == "done" and not self.record.cohort and self._path.exists():
      earlier = Record(**json.loads(self._path.read_text()))
      if earlier.state == "done" and earlier.cohorts == self.record.cohorts:
        return
    self.record.state, self.record.reason, self.record.ended = state, reason, _now()
    if self._first or state == "failed":
      files.write_json(self._path, dataclasses.asdict(self.record), every_process=True)


def job_id() -> str | None:
  """This process's Slurm job as Slurm writes it (12, or 12_3 in an array), or None."""
  array = os.environ.get("SLURM_ARRAY_JOB_ID")
  if array:
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
  return os.environ.get("SLURM_JOB_ID")


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _start_time(pid: int) -> str:
  """Field 22 of /proc/PID/stat; '' if there is no such process or it is a zombie."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] == "Z" else fields[19]
