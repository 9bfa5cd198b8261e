"""Memory and collectives of chosen points, from the TPU compiler: one row per point."""

import pathlib
from collections.abc import Callable
from typing import Any

import pandas as pd

from experiments.analysis import scaling_points as points
from qlora_jax.planning import compile as compile_lib
from qlora_jax.planning import estimate, hlo

KEY = ["scale", "atoms", "kept", "rank"]

# The target first, then the extremes of M, k and R, then the other sizes; each after its LoRA.
CHOSEN = (
  points.TARGET,
  points.Point("70B", 4096, 4, 16),
  points.Point("70B", 64, 4, 64),
  points.Point("70B", 4096, 0, 16),
  points.Point("70B", 16, 2, 8),
  points.Point("8B", 64, 4, 16),
  points.Point("405B", 64, 4, 16),
)


def order() -> list[points.Point]:
  """The chosen points, each after LoRA of its size and rank."""
  return list(dict.fromkeys(own for point in CHOSEN for own in (point.lora, point)))


def run(path: pathlib.Path, log: Callable[[str], None], limit: int | None = None) -> None:
  """Compiles points that the CSV file lacks, at most `limit`; stores each when it is done."""
  path.parent.mkdir(parents=True, exist_ok=True)
  for point in order():
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)
    known = set(rows[KEY].itertuples(index=False, name=None))
    if (point.scale, point.atoms, point.kept, point.rank) in known:
      continue
    if limit is not None and limit < 1:
      return
    log(f"compiling {point.label}")
    job, topology = points.job_of(point)
    rows = pd.concat([rows, pd.DataFrame([_row(point, compile_lib.run(job, topology))])])
    partial = path.with_name(f"{path.name}.partial")
    rows.to_csv(partial, index=False)
    partial.replace(path)
    limit = None if limit is None else limit - 1


def _row(point: points.Point, report: dict[str, Any]) -> dict[str, Any]:
  memory = report["memory"]
  collectives = [hlo.Collective(**fields) for fields in report.get("collectives", ())]
  row = {
    "scale": point.scale,
    "atoms": point.atoms,
    "kept": point.kept,
    "rank": point.rank,
    "hbm": report.get("used") or sum(memory.values()),
    "peak": report.get("peak"),
    "collectives": sum(item.times for item in collectives),
    "collective_bytes": sum(item.wire * item.times for item in collectives),
    "routed_collectives": len(estimate.of_routing(collectives)),
    "compile_seconds": report["compile_seconds"],
  }
  row |= {f"hbm_{kind}": size for kind, size in memory.items()}
  row |= {f"count_{kind}": total["count"] for kind, total in estimate.by_kind(collectives).items()}
  return row
