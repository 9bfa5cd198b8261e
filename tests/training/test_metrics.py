"""The record of a run: valid JSON lines, TensorBoard events, and resuming without repeats."""

import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from qlora_jax import errors
from qlora_jax.training import metrics


def _lines(directory):
  return (directory / metrics.FILE_NAME).read_text().splitlines()


def test_write_appends_one_json_line_with_step_and_run(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(3, {"train/loss": np.float32(0.5)})
    writer.write(4, {"train/loss": 0.25, "router/entropy": 1}, run="lr=0.1")
  first, second = (json.loads(line) for line in _lines(tmp_path))
  assert first == {"step": 3, "train/loss": 0.5}
  assert second == {"step": 4, "run": "lr=0.1", "train/loss": 0.25, "router/entropy": 1.0}


def test_non_finite_values_stay_valid_json_and_read_back_as_floats(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf}, run="nan")

  def refuse(name):
    raise AssertionError(name)

  raw = json.loads(_lines(tmp_path)[0], parse_constant=refuse)
  assert raw == {"step": 1, "run": "nan", "a": "nan", "b": "inf", "c": "-inf"}
  (record,) = metrics.read_metrics(tmp_path)
  assert math.isnan(record["a"])
  assert record["b"] == math.inf and record["c"] == -math.inf
  assert record["run"] == "nan"


def test_truncate_drops_later_steps_and_writing_goes_on(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, {"train/loss": float(step)})
  with metrics.MetricWriter(tmp_path) as writer:
    writer.truncate(3)
    writer.write(4, {"train/loss": 40.0})
  steps = [(r["step"], r["train/loss"]) for r in metrics.read_metrics(tmp_path)]
  assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
  assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", ['{"step": 3, "train/lo', '{"step": 3}\n{"st', '{"step": 3, "a\n'])
def test_torn_last_line_is_dropped(tmp_path, torn):
  path = tmp_path / metrics.FILE_NAME
  path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
  with metrics.MetricWriter(tmp_path) as writer:
    writer.truncate(2)
    writer.write(3, {"a": 1.0})
  assert metrics.read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "a": 1.0}]


def test_reopening_after_a_kill_does_not_join_two_records(tmp_path):
  (tmp_path / metrics.FILE_NAME).write_text('{"step": 1}\n{"step": 2')
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(2, {"a": 1.0})
  assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [1, 2]


def _events(directory):
  """The TensorBoard events of a directory in the order written: TFRecord frames, unchecked."""
  for path in sorted(directory.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      at += 12 + length + 4


def test_tensorboard_tags_carry_the_run_label(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(1, {"train/loss": 0.5})
    writer.write(1, {"train/loss": 0.25}, run="lora-3")
  found = [(v.tag, e.step, v.simple_value) for e in _events(tmp_path) for v in e.summary.value]
  assert found == [("train/loss", 1, 0.5), ("train/loss/lora-3", 1, 0.25)]


def test_truncate_tells_tensorboard_to_purge_the_later_steps(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(3, {"train/loss": 3.0})
    writer.truncate(2)
    writer.write(3, {"train/loss": 30.0})
  starts = [e.step for e in _events(tmp_path) if e.session_log.status == event_pb2.SessionLog.START]
  assert starts == [3]
  values = [v.simple_value for e in _events(tmp_path) for v in e.summary.value]
  assert values == [3.0, 30.0]  # the second file did not overwrite the first


def test_flush_makes_lines_readable_before_close(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(1, {"a": 1.0})
    writer.flush()
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "a": 1.0}]


def test_reserved_names_are_refused_and_leave_no_line(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="'run'"):
    writer.write(1, {"run": 1.0})
  assert _lines(tmp_path) == []


def test_reading_names_the_missing_file_and_the_damaged_line(tmp_path):
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl: no such file"):
    metrics.read_metrics(tmp_path)
  (tmp_path / metrics.FILE_NAME).write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
  with pytest.raises(errors.UserError, match="line 2"):
    metrics.read_metrics(tmp_path)
