"""The scaling study's points: all of the grid, cheap sums equal to full estimates, and resuming."""

import dataclasses

import pandas as pd
import pytest

from experiments import __main__ as command
from experiments.analysis import scaling_compiled as compiled
from experiments.analysis import scaling_points as points
from experiments.studies import scaling
from qlora_jax.models import decoder
from qlora_jax.planning import compile as compile_lib
from qlora_jax.planning import estimate, hlo, search

TINY = decoder.DecoderConfig(
  vocabulary=256,
  width=64,
  hidden=128,
  layers=8,
  heads=16,
  groups=16,
  head_dim=8,
  base_dtype="bfloat16",
  dtype="bfloat16",
  remat="full",
)


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setattr(points, "shape_of", lambda scale: TINY)
  points.plain_hbm.cache_clear()
  yield
  points.plain_hbm.cache_clear()


def test_the_grid_is_every_size_m_k_and_r():
  found = points.grid()
  assert len(set(found)) == 3 * 5 * 4 * 3 and points.TARGET in found
  assert all(point in found for point in compiled.CHOSEN)


@pytest.mark.parametrize("fields", [(64, 4, 16), (4096, 4, 8), (256, 0, 16)])
def test_extra_memory_is_the_difference_of_two_full_estimates(tiny, fields):
  point = points.Point("70B", *fields)
  full = search.estimated(*points.job_of(point)).total
  plain = search.estimated(*points.job_of(point.lora)).total
  assert points.extra(point)["extra_hbm"] == pytest.approx(full - plain, rel=0.02)


def test_a_study_continues_where_it_stopped_and_draws(tiny, monkeypatch, tmp_path, capsys):
  asked = []

  def run(job, topology, hlo=""):
    asked.append(job)
    collective = {
      "kind": "all-reduce",
      "bytes": 1000 * len(asked),
      "group": 4,
      "times": 8,
      "across": False,
      "source": "blocks/layer_0/o/branch/dot",
    }
    return {
      "fits": True,
      "compile_seconds": 1.0,
      "memory": {"base": 10**9 + len(asked)},
      "peak": 10**9,
      "collectives": [collective],
    }

  monkeypatch.setattr(compile_lib, "run", run)
  small = [dataclasses.replace(points.TARGET, atoms=atoms) for atoms in (16, 64)]
  monkeypatch.setattr(points, "grid", lambda: small)
  monkeypatch.setattr(compiled, "CHOSEN", (points.TARGET,))
  arguments = ["scaling", f"--workdir={tmp_path}", f"--results={tmp_path}"]
  assert command.main([*arguments, "--limit=1"]) == 0
  assert len(asked) == 1 and asked[0].model.adapter.family == "lora"
  assert command.main(arguments) == command.main(arguments) == 0
  assert len(asked) == 2 and asked[1].model.adapter.atoms == 64
  kept = pd.read_csv(tmp_path / scaling.COMPILED)
  assert list(kept["atoms"]) == [0, 64] and list(kept["routed_collectives"]) == [0, 0]
  assert "| 70B | 64 | 4 | 16 |" in (tmp_path / "summary.md").read_text()
  assert (tmp_path / "scaling.png").stat().st_size > 10_000
  assert (tmp_path / "scaling.svg").exists() and "| 70B | 64 | 4 | 16 |" in capsys.readouterr().out


def test_a_collective_of_the_router_in_the_loop_is_told():
  own = {"kind": "all-reduce", "bytes": 8, "group": 4, "across": False}
  found = estimate.of_routing(
    [
      hlo.Collective(**own, times=8, source="while/body/blocks/router/dot"),
      hlo.Collective(**own, times=8, source="while/body/blocks/layer_0/q/dot"),
      hlo.Collective(**own, times=1, source="blocks/router/dot"),
    ]
  )
  assert [each.source for each in found] == ["while/body/blocks/router/dot"]


def test_the_target_is_the_point_that_tables_and_claims_read():
  rows = pd.DataFrame([points.extra(points.TARGET)])
  assert len(scaling._at_target(rows)) == 1 and points.TARGET.scale == scaling._SCALE
