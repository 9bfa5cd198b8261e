"""The loop that trains any workload: restore, (update, log, validate, save, stop), evaluate.

A killed training resumes from its last checkpoint and gives the same bits on the same machine: the
order of the data is a function of the seed, its position is in the checkpoint, and there is no
other randomness.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from qlora_jax import errors, files
from qlora_jax.parallel import processes, sharding
from qlora_jax.training import checkpoint, metrics, progress, stop
from qlora_jax.workloads import workload as workload_lib

CHECKPOINTS = "checkpoints"
RESULT = "result.json"
NONFINITE = "nonfinite_batch.npz"  # the input of the update whose loss was not finite


@dataclasses.dataclass(frozen=True)
class Saving:
  """Where, when and how a training is saved.

  Attributes:
    directory: of result, checkpoints and metrics.
    seconds: least time between two checkpoints.
    keep: newest checkpoints that are kept.
    keep_best: checkpoints of the least `objective` that are kept beside them.
    objective: the score of `validate` that says which step is best.
    config: plain; a checkpoint of another config is refused.
    at_end: whether the last step is saved, too: where evaluating takes long.
    on_nonfinite: 'end' ends the training once the losses of all its trials are not finite; 'stop'
      looks after every update, keeps the batch of the first such loss of any trial, and raises.
  """

  directory: pathlib.Path
  seconds: float = 60.0
  keep: int = 2
  keep_best: int = 0
  objective: str = ""
  config: dict[str, Any] | None = None
  at_end: bool = False
  on_nonfinite: str = "end"


def train(
  workload: workload_lib.Workload, saving: Saving, display: progress.Display
) -> dict[str, Any]:
  """Trains a workload, evaluates it and stores the result in `RESULT`.

  Returns:
    `Workload.evaluate`'s tables, 'rows' with their 'seconds', and 'curves'.

  Raises:
    stop.Stopped: a stop was requested; what is done is saved.
    errors.UserError: a loss is not finite, and `Saving.on_nonfinite` is 'stop'.
  """
  saving.directory.mkdir(parents=True, exist_ok=True)
  began = time.monotonic()
  state, best = fit(workload, workload.init(), saving, display)
  result = workload.evaluate(state, best)
  for row in result["rows"]:
    row["seconds"] = (time.monotonic() - began) / len(result["rows"])
  result["curves"] = _curves(workload, result["rows"], saving.directory)
  for row, columns in zip(result["rows"], result.pop("last", ()), strict=False):
    for line in [line for line in result["curves"] if line["trial_id"] == row["trial_id"]][-1:]:
      line |= columns
  files.write_json(saving.directory / RESULT, result)
  clear(saving.directory)
  return result


def stored(directory: pathlib.Path) -> dict[str, Any] | None:
  """The result that an earlier process stored, or None."""
  path = directory / RESULT
  if not processes.agreed(path.exists()):
    return None
  clear(directory)  # the process may have been killed before it could
  return json.loads(path.read_text())


def clear(directory: pathlib.Path) -> None:
  """Removes the checkpoints of a training whose result is stored."""
  if processes.is_first():
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def fit(
  workload: workload_lib.Workload,
  state: workload_lib.State,
  saving: Saving | None,
  display: progress.Display,
) -> tuple[workload_lib.State, workload_lib.Best | None]:
  """Takes all steps of a workload from `state`, or from the newest checkpoint.

  Args:
    saving: None keeps neither metrics nor checkpoints.

  Returns:
    The last state, and the best one where it was looked for.

  Raises:
    stop.Stopped: a stop was requested; what is done is saved.
  """
  step, pending, amount = 0, [], 0
  with contextlib.ExitStack() as stack:
    record = stack.enter_context(_Record(saving, display)) if saving else None
    if record and (saved := record.restore(state)):
      step, state = saved.step, saved.tree
      workload.seek(saved.extra["position"])
      pending = [_as_float32(values) for values in saved.extra["pending"]]
    shown = stack.enter_context(
      display.cohort(workload.name, len(workload.trial_labels), max(workload.steps, 1), step)
    )
    marked = time.monotonic()
    while step < workload.steps:
      count = min(workload.chunk, workload.steps - step)
      batches = workload.batches(step, count)
      state, values = workload.update(state, batches.arrays)
      if record and saving.on_nonfinite == "stop":
        record.refuse_nonfinite(workload, step, count, values, batches.arrays)
      step, amount = step + count, amount + batches.amount
      pending.append(values)
      logged = step == workload.steps or step % workload.log_every == 0
      # One process stops after any step, several where all of them ask each other.
      if not logged and not (jax.process_count() == 1 and stop.requested()):
        continue
      pending, objective = jax.device_get(pending), None  # waits for the steps
      if logged:
        means, scores = _means(pending), workload.validate(state, step)
        rate, pending = amount / (time.monotonic() - marked), []
        losses = np.ravel(means["train/loss"])
        finite = losses[np.isfinite(losses)]
        shown.update(step, loss=float(np.median(finite if len(finite) else losses)), rate=rate)
        if record:
          objective = record.write(workload, step, means, scores, rate)
        if step < workload.steps and not len(finite):
          display.log(
            f"{workload.name}: the loss is not finite at step {step} of {workload.steps}; training"
            " ends here. Try a smaller optimizer.learning_rate"
          )
          break
      if record:
        record.save_if_due(workload, step, state, pending, objective)
      elif stop.requested():
        stop.check()
      amount, marked = 0, time.monotonic()
    shown.update(max(workload.steps, 1))
    return state, record.best(state) if record else None


class _Record:
  """Metrics and checkpoints of one training; a context manager."""

  def __init__(self, saving: Saving, display: progress.Display):
    self.saving = saving
    self._stack = contextlib.ExitStack()
    self._display = display

  def __enter__(self) -> "_Record":
    saving = self.saving
    self.writer = self._stack.enter_context(
      metrics.MetricWriter(processes.own_directory(saving.directory))
    )
    self.saver = self._stack.enter_context(
      checkpoint.Checkpointer(
        saving.directory / CHECKPOINTS,
        keep=saving.keep,
        keep_best=saving.keep_best,
        config=saving.config,
        log=self._display.log,
      )
    )
    return self

  def __exit__(self, *exc_info) -> None:
    self._stack.__exit__(*exc_info)

  def restore(self, state: workload_lib.State) -> checkpoint.Restored | None:
    saved = self.saver.restore(state)
    self.writer.truncate(saved.step if saved else 0)
    self._least = (self.saver.best() or (0, math.inf))[1]
    self._saved_at = time.monotonic()
    return saved

  def write(self, workload, step, means, scores, rate) -> float | None:
    """One line of metrics per trial; returns the score that says which step is best."""
    for place, label in enumerate(workload.trial_labels):
      scalars = {name: np.ravel(value)[place] for name, value in means.items()}
      scalars[f"train/{workload.unit}_per_second"] = rate
      self.writer.write(step, {**scalars, **(scores[place] if scores else {})}, label)
    return scores[0].get(self.saving.objective) if scores else None

  def refuse_nonfinite(self, workload, step, count, values, arrays) -> None:
    """Keeps the arrays of the update and raises where a loss of it is not finite."""
    if np.isfinite(jax.device_get(values["train/loss"])).all():
      return
    path = self.saving.directory / NONFINITE
    leaves = jax.tree_util.tree_leaves_with_path(sharding.gathered(arrays))
    if processes.is_first():
      with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{jax.tree_util.keystr(name): leaf for name, leaf in leaves})
    raise errors.UserError(
      f"checkpoint.on_nonfinite: the loss of {workload.name} is not finite in steps {step + 1} to"
      f" {step + count}; their input is in {path}. Try a smaller optimizer.learning_rate, or 'end'"
    )

  def save_if_due(self, workload, step, state, pending, objective) -> None:
    """Saves when the time has come, for a better step, and before stopping."""
    better = objective is not None and objective < self._least and self.saving.keep_best > 0
    asked, due = checkpoint.agree(
      int(stop.requested() or 0), time.monotonic() - self._saved_at > self.saving.seconds
    )
    last = self.saving.at_end and step == workload.steps
    if asked or due or better or last:
      self.writer.flush()
      extra = {"position": workload.position(), "pending": [_as_floats(v) for v in pending]}
      self.saver.save(step, state, extra, metric=objective)
      self._saved_at = time.monotonic()
      self._least = objective if better else self._least
    if asked:
      self.saver.wait()
      raise stop.Stopped(asked)

  def best(self, state: workload_lib.State) -> workload_lib.Best | None:
    restored = self.saver.restore_best(state)
    if restored is None:
      return None
    return workload_lib.Best(restored.step, restored.tree, self._least)


def _curves(workload, rows: list[dict], directory: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics as rows of a table; empty in all processes but the first."""
  if not processes.is_first():
    return []
  places = {label: place for place, label in enumerate(workload.trial_labels)}
  return [
    {
      "trial_id": rows[places[line.get("run")]]["trial_id"],
      "step": line["step"],
      **{column: line[name] for name, column in workload.curve_columns.items() if name in line},
    }
    for line in metrics.read_metrics(directory)
  ]


def _means(pending: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {
    name: np.mean(np.stack([values[name] for values in pending]), axis=0) for name in pending[0]
  }


def _as_floats(values: dict[str, np.ndarray]) -> dict[str, Any]:
  return {name: np.asarray(value).tolist() for name, value in values.items()}


def _as_float32(values: dict[str, Any]) -> dict[str, np.ndarray]:
  return {name: np.asarray(value, np.float32) for name, value in values.items()}
