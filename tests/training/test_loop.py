"""The loop on a workload of its own: gradient descent on a parabola, two trials at a time."""

import io
import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qlora_jax import errors
from qlora_jax.training import loop, metrics, progress, stop
from qlora_jax.workloads import workload


@jax.jit
def descend(state, noise, rates):
  def one(x, target):
    loss = jnp.square(x - target)
    return x - rates * 2 * (x - target), loss

  x, losses = jax.lax.scan(one, state["x"], noise)
  return {"x": x}, {"train/loss": jnp.mean(losses, axis=0), "train/grad_norm": jnp.abs(x)}


class Parabola:
  """x -> x - 2 r (x - target); a trial per rate, the targets a function of the step."""

  name, unit, chunk, log_every, steps = "parabola", "examples", 2, 4, 12
  trial_labels = ("a", "b")
  curve_columns = {"train/loss": "train_loss", "validation/x": "x", "validation/late": "late"}  # noqa: RUF012

  def __init__(self, rates=(0.1, 0.2)):
    self.rates = jnp.asarray(rates, jnp.float32)
    self.asked, self.position_of = [], 0

  def init(self):
    return {"x": jnp.array([1.0, -1.0])}

  def batches(self, start, count):
    assert start == self.position_of
    self.position_of += count
    self.asked.append((start, count))
    targets = np.sin(np.arange(start, start + count, dtype=np.float32))[:, None]
    return workload.Batches(targets, count * 2)

  def position(self):
    return {"at": self.position_of}

  def seek(self, position):
    self.position_of = position["at"]

  def update(self, state, arrays):
    return descend(state, arrays, self.rates)

  def validate(self, state, step):
    return [{"validation/x": float(x), "validation/objective": abs(step - 8.0)} for x in state["x"]]

  def evaluate(self, state, best):
    rows = [{"trial_id": name, "x": float(x)} for name, x in zip("ab", state["x"], strict=True)]
    self.best = best
    return {"rows": rows, "last": [{"late": 7.0}, {"late": 8.0}]}


@pytest.fixture
def display():
  with progress.Display(total_trials=2, plain=True, stream=io.StringIO()) as shown:
    yield shown


def by_hand(rates, steps):
  x = np.array([1.0, -1.0], np.float32)
  for step in range(steps):
    x = x - np.asarray(rates, np.float32) * 2 * (x - np.sin(np.float32(step)))
  return x


def test_a_workload_is_trained_recorded_and_stored(tmp_path, display):
  trained = Parabola()
  result = loop.train(trained, loop.Saving(tmp_path), display)
  np.testing.assert_allclose([row["x"] for row in result["rows"]], by_hand((0.1, 0.2), 12), 1e-5)
  assert trained.asked == [(start, 2) for start in range(0, 12, 2)]
  assert [(line["trial_id"], line["step"]) for line in result["curves"]] == [
    ("a", 4),
    ("b", 4),
    ("a", 8),
    ("b", 8),
    ("a", 12),
    ("b", 12),
  ]
  # What is measured once, at the end, stands with the last point alone.
  assert [line.get("late") for line in result["curves"]] == [None] * 4 + [7.0, 8.0]
  x, losses = np.array([1.0, -1.0]), []
  for step in range(4):
    losses.append(np.square(x - np.sin(step)))
    x = x - np.array([0.1, 0.2]) * 2 * (x - np.sin(step))
  np.testing.assert_allclose(
    [line["train_loss"] for line in result["curves"][:2]], np.mean(losses, axis=0), 1e-5
  )
  assert loop.stored(tmp_path) == json.loads(json.dumps(result))
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("after", [1, 5, 9])
def test_an_interrupted_training_gives_the_same_numbers(tmp_path, display, monkeypatch, after):
  whole = loop.train(Parabola(), loop.Saving(tmp_path / "whole"), display)
  saving = loop.Saving(tmp_path / "parts", seconds=0.0)
  stopped = Parabola()
  monkeypatch.setattr(stop, "requested", lambda: 15 if stopped.position_of > after else None)
  with pytest.raises(stop.Stopped):
    loop.train(stopped, saving, display)
  monkeypatch.undo()
  assert loop.stored(saving.directory) is None
  resumed = Parabola()
  result = loop.train(resumed, saving, display)
  assert resumed.asked[0][0] > 0  # from its checkpoint
  for row in (*whole["rows"], *result["rows"]):
    row.pop("seconds")
  assert result == whole
  whole_lines, lines = (metrics.read_metrics(tmp_path / name) for name in ("whole", "parts"))
  for line in (*whole_lines, *lines):
    line.pop("train/examples_per_second")
  assert lines == whole_lines


def test_the_best_step_is_kept_and_given_to_evaluate(tmp_path, display):
  trained = Parabola()
  saving = loop.Saving(tmp_path, keep_best=1, objective="validation/objective")
  loop.train(trained, saving, display)
  assert (trained.best.step, trained.best.objective) == (8, 0.0)
  np.testing.assert_allclose(trained.best.state["x"], by_hand((0.1, 0.2), 8), 1e-5)


def test_training_ends_once_no_trial_has_a_finite_loss(tmp_path, display):
  one = Parabola(rates=(0.1, 1e30))
  result = loop.train(one, loop.Saving(tmp_path / "one"), display)
  assert np.isfinite(result["rows"][0]["x"]) and not np.isfinite(result["rows"][1]["x"])
  assert one.position_of == 12 and "not finite" not in display._stream.getvalue()
  both = Parabola(rates=(1e30, 1e30))
  result = loop.train(both, loop.Saving(tmp_path / "both"), display)
  assert both.position_of == 4 and len(result["rows"]) == 2
  assert "parabola: the loss is not finite at step 4 of 12" in display._stream.getvalue()


def test_on_request_the_first_loss_that_is_not_finite_stops_with_its_batch(tmp_path, display):
  trained = Parabola(rates=(0.1, 1e10))
  saving = loop.Saving(tmp_path, on_nonfinite="stop")
  with pytest.raises(errors.UserError, match="steps 3 to 4") as raised:
    loop.train(trained, saving, display)
  assert "\n" not in str(raised.value) and str(tmp_path / loop.NONFINITE) in str(raised.value)
  with np.load(tmp_path / loop.NONFINITE) as kept:
    (batch,) = (kept[name] for name in kept)
  np.testing.assert_array_equal(batch, np.sin(np.arange(2, 4, dtype=np.float32))[:, None])
  assert loop.stored(tmp_path) is None
