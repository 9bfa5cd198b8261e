"""Figures of the TPU compiler for chosen points, one CSV row a point, kept as they are made."""

import pathlib
from collections.abc import Callable
from typing import Any

import pandas as pd

from experiments.scaling import points
from qlora_jax.planning import compile as compile_lib
from qlora_jax.planning import estimate, hlo

FILE = "compiled.csv"
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


def read(folder: pathlib.Path) -> pd.DataFrame:
  """The rows there are; empty where nothing has been compiled."""
  path = folder / FILE
  return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)


def order() -> list[points.Point]:
  """The chosen points, each after LoRA of its size and rank."""
  return list(dict.fromkeys(each for point in CHOSEN for each in (point.lora, point)))


def run(folder: pathlib.Path, log: Callable[[str], None], limit: int | None = None) -> None:
  """Compiles what is missing, at most `limit` points; every point is stored once it is done."""
  folder.mkdir(parents=True, exist_ok=True)
  for point in order():
    rows = read(folder)
    known = rows[KEY].itertuples(index=False, name=None)
    if (point.scale, point.atoms, point.kept, point.rank) in set(known):
      continue
    if limit is not None and limit < 1:
      return
    log(f"compiling {point.label}")
    job, topology = points.job_of(point)
    rows = pd.concat([rows, pd.DataFrame([_row(point, compile_lib.run(job, topology))])])
    partial = folder / (FILE + ".partial")
    rows.to_csv(partial, index=False)
    partial.replace(folder / FILE)
    limit = None if limit is None else limit - 1


def _row(point: points.Point, found: dict[str, Any]) -> dict[str, Any]:
  memory = found["memory"]
  collectives = [hlo.Collective(**each) for each in found.get("collectives", ())]
  row = {
    "scale": point.scale,
    "atoms": point.atoms,
    "kept": point.kept,
    "rank": point.rank,
    "hbm": found.get("used") or sum(memory.values()),
    "peak": found.get("peak"),
    "collectives": sum(each.times for each in collectives),
    "collective_bytes": sum(each.wire * each.times for each in collectives),
    "routed_collectives": len(estimate.of_routing(collectives)),
    "compile_seconds": found["compile_seconds"],
  }
  row |= {f"hbm_{kind}": size for kind, size in memory.items()}
  row |= {f"count_{kind}": each["count"] for kind, each in estimate.by_kind(collectives).items()}
  return row
