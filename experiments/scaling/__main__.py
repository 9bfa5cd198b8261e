"""The scaling study: what Queryable LoRA costs beyond LoRA at 8B, 70B and 405B parameters.

python -m experiments.scaling                        # the analytic table, and the figure
python -m experiments.scaling --compile              # compiles the chosen points that are missing
python -m experiments.scaling --compile --limit=2    # two of them; the same command continues
"""

import pathlib
import sys

import pandas as pd

from experiments import command
from experiments.scaling import compiled, figure, points

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "scaling"


def against_lora(rows: pd.DataFrame) -> pd.DataFrame:
  """Compiled extra memory and collectives of every routed point whose LoRA was compiled too."""
  found = []
  for row in rows[rows["atoms"] > 0].itertuples():
    plain = rows[(rows["scale"] == row.scale) & (rows["atoms"] == 0) & (rows["rank"] == row.rank)]
    if plain.empty:
      continue
    plain = plain.iloc[0]
    point = points.Point(row.scale, row.atoms, row.kept, row.rank)
    guess = points.extra(point)
    found.append(
      {
        "scale": row.scale,
        "atoms": row.atoms,
        "kept": row.kept or row.atoms,
        "rank": row.rank,
        "hbm": row.hbm,
        "lora_hbm": plain["hbm"],
        "extra_hbm": row.hbm - plain["hbm"],
        "extra_hbm_percent": 100 * (row.hbm / plain["hbm"] - 1),
        "extra_peak_percent": 100 * (row.peak - plain["peak"]) / plain["hbm"],
        "analytic_extra_hbm_percent": guess["extra_hbm_percent"],
        "analytic_lora_hbm": guess["lora_hbm"],
        "extra_collectives": row.collectives - plain["collectives"],
        "routed_collectives": row.routed_collectives,
        "extra_collective_bytes": row.collective_bytes - plain["collective_bytes"],
        "extra_collective_percent": 100 * (row.collective_bytes / plain["collective_bytes"] - 1),
      }
    )
  return pd.DataFrame(found)


def summary(table: pd.DataFrame, checked: pd.DataFrame) -> str:
  """Markdown: the points at M = 64, k = 4, R = 16, the dearest ones, and what was compiled."""
  lines = [
    "| model | M | k | R | extra FLOPs | extra HBM | extra parameters | gradient sum |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  wanted = (
    ((table["atoms"] == 64) & (table["kept"] == 4) & (table["rank"] == 16))
    | ((table["atoms"] == 4096) & (table["kept"] == 4))
    | ((table["atoms"] == 4096) & table["dense"])
  )
  for row in table[wanted].itertuples():
    lines.append(
      f"| {row.scale} | {row.atoms} | {row.kept} | {row.rank} | {row.extra_flops_percent:.3f} % |"
      f" {row.extra_hbm_percent:.2f} % | {row.extra_params:,.0f} ({row.extra_params_percent:.2f} %)"
      f" | {row.extra_collective_bytes / 2**20:.2f} MiB |"
    )
  if len(checked):
    lines += [
      "",
      "Compiled:",
      "",
      "| model | M | k | R | LoRA's HBM | extra HBM | alive at once | analytic | collectives more |"
      " their bytes | on the routed path |",
      "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in checked.itertuples():
      lines.append(
        f"| {row.scale} | {row.atoms} | {row.kept} | {row.rank} | {row.lora_hbm / 2**30:.2f} GiB |"
        f" {row.extra_hbm_percent:.2f} % | {row.extra_peak_percent:.2f} % |"
        f" {row.analytic_extra_hbm_percent:.2f} % |"
        f" {row.extra_collectives:+.0f} | {row.extra_collective_percent:+.3f} % |"
        f" {row.routed_collectives:.0f} |"
      )
  return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
  parser = command.parser("scaling", __doc__)
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  parser.add_argument("--compile", action="store_true", help="compile what is missing first")
  parser.add_argument("--limit", type=int, help="compile at most so many points")
  given = parser.parse_args(arguments)
  given.results.mkdir(parents=True, exist_ok=True)
  if given.compile:
    compiled.run(given.results, lambda text: print(text, file=sys.stderr, flush=True), given.limit)
  table = pd.DataFrame([points.extra(point) for point in points.grid()])
  table.to_csv(given.results / "analytic.csv", index=False, float_format="%.9g")
  checked = against_lora(compiled.read(given.results))
  (given.results / "summary.md").write_text(summary(table, checked))
  if checked.empty:
    checked = pd.DataFrame(columns=["scale", "atoms", "kept", "rank", "extra_hbm_percent"])
  figure.draw(table, checked, given.results / "scaling")
  print(summary(table, checked))
  print(f"results: {given.results}")


if __name__ == "__main__":
  command.run(main)
