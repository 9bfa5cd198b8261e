"""The worked example of a new study: its record, registered from outside, makes what it says."""

import re

import numpy as np
import pytest

from experiments import __main__ as command
from experiments import committed, notebooks, study
from qlora_jax import errors
from qlora_jax.studies import statistics


@pytest.fixture
def record(monkeypatch):
  """The page's study, registered for one test."""
  monkeypatch.setattr(study, "_registered", {})
  page = (committed.ROOT / "docs" / "new_study.md").read_text()
  (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  assert len(block.splitlines()) < 60
  names = {}
  exec(compile(block, "new_study.md", "exec"), names)
  return study.register(names["STUDY"])


def test_the_example_makes_its_table_claim_and_figure(record, make_study, tmp_path, capsys):
  rows = make_study(tmp_path, tasks=("regimes",), methods=("none", "lora", "full"), seeds=8)
  assert command.main([record.name, f"--results={tmp_path}"]) == 0
  out = capsys.readouterr().out
  final = rows[rows["stage"] == "final"].pivot(index="seed", columns="arm", values="test_mse")
  ends = statistics.paired_relative_interval(final["full"], final["lora"])
  assert ends.high < 0
  mean, low, high = (f"{end:+.1f}".replace("-", "−") for end in np.array(ends))
  assert f"| full fine-tuning | {mean} % [{low}, {high}] |" in out
  claim = "full fine-tuning has a lower error than LoRA"
  assert f"| {claim} | supported | {mean} % [{low}, {high}] |" in out
  assert (tmp_path / f"{record.name}.png").stat().st_size > 5_000
  assert f"results: {tmp_path}" in out


def test_a_registered_study_is_listed_and_has_a_notebook(record, capsys):
  assert command.main([]) == 0
  assert f"| {record.name} | {record.question} | no |" in capsys.readouterr().out
  assert notebooks.FOLDER / f"{record.name}.ipynb" in notebooks.files()
  with pytest.raises(errors.UserError, match="there is one of this name"):
    study.register(record)
