"""Committed results of a study: whole, from parts, and without the machine's paths."""

import json
import pathlib

import pandas as pd
import pytest

from experiments import __main__ as command
from experiments import committed
from qlora_jax import errors


def part(folder, methods, commit="aaa", steps=40, stage="final"):
  folder.mkdir()
  rows = [
    {"stage": stage, "task": "regimes", "arm": method, "seed": seed, "test_mse": 0.5}
    for method in methods
    for seed in (100, 101)
  ]
  pd.DataFrame(rows).to_parquet(folder / "results.parquet")
  pd.DataFrame({"trial_id": methods, "step": 1}).to_parquet(folder / "curves.parquet")
  study = {
    "command": f"python launch.py --workdir={folder}/work --sweep",
    "commit": commit,
    "date": "2026-01-01",
    "devices": "cpu",
    "wall_seconds": 5.0,
    "config": {"data": {"data_dir": str(folder), "manual_folder": str(folder)}, "steps": steps},
  }
  (folder / "study.json").write_text(json.dumps(study))
  return folder


def test_parts_are_joined_in_order(tmp_path):
  parts = [part(tmp_path / "a", ["lora", "static"]), part(tmp_path / "b", ["routed"], "bbb")]
  target = tmp_path / "kept"
  assert command.main(["keep", *(f"--from={each}" for each in parts), f"--results={target}"]) == 0
  assert list(committed.Results(target).rows["arm"].unique()) == ["lora", "static", "routed"]
  assert len(pd.read_parquet(target / "curves.parquet")) == 3
  text = (target / "study.json").read_text()
  study = json.loads(text)
  assert str(tmp_path) not in text
  assert study["commit"] == "aaa, bbb" and study["wall_seconds"] == 10
  assert study["date"] == "2026-01-01"


def test_a_kept_study_can_be_a_part_and_the_target(tmp_path):
  target = tmp_path / "kept"
  committed.keep(part(tmp_path / "a", ["lora"]), target)
  committed.keep([target, part(tmp_path / "b", ["routed"])], target)
  assert list(committed.Results(target).rows["arm"].unique()) == ["lora", "routed"]
  assert not (target / "curves.parquet").exists()


@pytest.mark.parametrize(
  ("second", "words"),
  [
    (dict(methods=["lora"]), "both hold regimes/lora"),
    (dict(methods=["routed"], steps=80), "steps was 40, is 80"),
    (dict(methods=["routed"], stage="search"), "no final run yet"),
  ],
)
def test_parts_that_do_not_belong_together(tmp_path, second, words):
  parts = [part(tmp_path / "a", ["lora"]), part(tmp_path / "b", **second)]
  with pytest.raises(errors.UserError, match=words):
    committed.keep(parts, tmp_path / "kept")
  assert not (tmp_path / "kept").exists()


def test_missing_results_are_named(tmp_path, capsys):
  with pytest.raises(errors.UserError, match="nowhere has no results"):
    committed.keep(pathlib.Path(tmp_path / "nowhere"), tmp_path / "kept")
  assert command.main(["keep", f"--from={tmp_path}"]) == 2
  assert "--from and --results" in capsys.readouterr().err
