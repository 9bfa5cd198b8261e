"""The scaling study's tables in Markdown, from `experiments/results/scaling` alone."""

import json
import pathlib

import pandas as pd

from experiments.scaling import points

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "scaling"
OVERHEAD = "overhead_cpu.csv"
PLANS = "plans"  # a folder of what `launch.py --plan --out=FILE.json` wrote
_GIB = 2**30


def targets(checked: pd.DataFrame, folder: pathlib.Path = RESULTS) -> str:
  """The targets at M = 64, k = 4, R = 16 at 70B beside what the formulas and the compiler say.

  Args:
    checked: compiled points against their LoRA.
    folder: of results.
  """
  goal = points.TARGET
  own = checked[(checked[["scale", "atoms", "kept", "rank"]] == _key(goal)).all(axis=1)].iloc[0]
  analytic = pd.read_csv(folder / "analytic.csv")
  guess = analytic[
    (analytic[["scale", "atoms", "kept", "rank"]] == _key(goal)).all(axis=1) & ~analytic["dense"]
  ].iloc[0]
  reserved = f"{own['extra_hbm_percent']:.2f} %"
  return markdown(
    ["target", "formulas", "the TPU compiler"],
    [
      ["under 1 % more FLOPs", f"{guess['extra_flops_percent']:.3f} %", "(counts a loop once)"],
      [
        "under 1 % more HBM",
        f"{guess['extra_hbm_percent']:.2f} %",
        f"{own['extra_peak_percent']:.2f} % alive at once;"
        f" {_judged(own['extra_hbm_percent'])}{reserved} reserved,"
        f" {own['lora_hbm'] / _GIB:.2f} to {own['hbm'] / _GIB:.2f} GiB",
      ],
      [
        "no collective on the routed path",
        "none",
        f"{own['routed_collectives']:.0f}; {own['extra_collective_percent']:+.2f} % of all bytes",
      ],
    ],
  )


def _judged(percent: float) -> str:
  return "" if percent < 1 else "**missed:** "


def _key(point: points.Point) -> list:
  return [point.scale, point.atoms, point.kept or point.atoms, point.rank]


def compiled(checked: pd.DataFrame) -> str:
  """Every compiled point against LoRA of its size and rank."""
  rows = [
    [
      row.scale,
      f"{row.atoms}",
      f"{row.kept}",
      f"{row.rank}",
      f"{row.lora_hbm / _GIB:.2f} GiB",
      f"{row.extra_hbm_percent:.2f} %",
      f"{row.extra_peak_percent:.2f} %",
      f"{row.analytic_extra_hbm_percent:.2f} %",
      f"{row.extra_collectives:+.0f}",
      f"{row.extra_collective_percent:+.2f} %",
      f"{row.routed_collectives:.0f}",
    ]
    for row in checked.itertuples()
  ]
  return markdown(
    [
      "model",
      "M",
      "k",
      "R",
      "LoRA's HBM",
      "extra HBM",
      "alive at once",
      "formulas",
      "collectives more",
      "their bytes",
      "on the routed path",
    ],
    rows,
  )


def overhead(folder: pathlib.Path = RESULTS) -> str:
  """Measured step time against LoRA's on one CPU machine, beside the ratio of FLOPs."""
  found = pd.read_csv(folder / OVERHEAD)
  rows = [
    [
      f"{row.rank}",
      f"{row.atoms}",
      f"{row.kept or row.atoms}",
      row.order,
      f"{row.lora_seconds:.2f} s",
      f"{row.ratio:.2f} x",
      f"{row.analytic:.4f} x",
    ]
    for row in found.itertuples()
  ]
  return markdown(["R", "M", "k", "order", "LoRA's step", "step time", "FLOPs, formulas"], rows)


def plans(folder: pathlib.Path = RESULTS) -> str:
  """What `launch.py --plan` said of each model and topology."""
  rows = []
  for path in sorted((folder / PLANS).glob("*.json")):
    found = json.loads(path.read_text())
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    hbm, times = found["hbm"], found["step_time"]
    fits = "fits" if found["fits"] else "**does not fit**"
    rows.append(
      [
        path.stem.split("@")[0],
        f"{found['slices']} x {found['topology']}",
        mesh,
        f"{hbm['needed'] / _GIB:.1f} of {hbm['limit'] / _GIB:.1f} GiB: {fits}",
        f"{times['estimate']:.1f} s, {times['bound']}" if times else "–",
        f"{found['compile']['compile_seconds']:.0f} s" if found["compiled"] else "–",
      ]
    )
  return markdown(
    ["model", "topology", "mesh", "HBM a chip", "step (estimate), bound by", "compiled in"], rows
  )


def markdown(header: list[str], rows: list[list[str]]) -> str:
  """A table in Markdown."""
  rule = ["---"] * len(header)
  return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]) + "\n"
