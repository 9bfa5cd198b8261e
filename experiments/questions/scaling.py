"""What does the shared memory cost at 8B, 70B and 405B parameters?"""

import functools
import pathlib

import pandas as pd

from experiments.questions import committed, question
from experiments.scaling import figure

_FOLDER = committed.RESULTS / "scaling"
_SCALE, _ATOMS, _KEPT, _RANK = "70B", 64, 4, 16  # `experiments.scaling.points.TARGET`
_COLUMNS = [
  "scale",
  "atoms",
  "kept",
  "rank",
  "extra_hbm_percent",
  "extra_peak_percent",
  "routed_collectives",
]


@functools.cache
def checked() -> pd.DataFrame:
  """The points that the TPU compiler has seen, in per cent of its LoRA of the same rank."""
  path = _FOLDER / "compiled.csv"
  if not path.is_file():
    return pd.DataFrame(columns=_COLUMNS)
  rows = pd.read_csv(path)
  lora = rows[rows["atoms"] == 0].set_index(["scale", "rank"])
  own = rows[rows["atoms"] > 0].copy()
  plain = lora.reindex(pd.MultiIndex.from_frame(own[["scale", "rank"]]))
  for name, column in (("hbm", "extra_hbm_percent"), ("peak", "extra_peak_percent")):
    own[column] = 100 * (own[name].to_numpy() - plain[name].to_numpy()) / plain["hbm"].to_numpy()
  own["kept"] = own["kept"].where(own["kept"] > 0, own["atoms"])
  return own[own["extra_hbm_percent"].notna()][_COLUMNS]


def targets() -> pd.DataFrame:
  """The setting that the targets are for, at every size."""
  rows = committed.csv("scaling", "analytic")
  chosen = (rows["atoms"] == _ATOMS) & (rows["kept"] == _KEPT) & (rows["rank"] == _RANK)
  return rows[chosen]


def _compiled(scale: str) -> pd.Series | None:
  rows = checked()
  own = rows[(rows["scale"] == scale) & (rows["atoms"] == _ATOMS) & (rows["rank"] == _RANK)]
  own = own[own["kept"] == _KEPT]
  return own.iloc[0] if len(own) else None


def table() -> str:
  """The target setting beside LoRA: FLOPs, parameters, memory by formula and by compiler."""
  rows = []
  for row in targets().itertuples():
    seen = _compiled(row.scale)
    rows.append(
      [
        row.scale,
        f"{row.extra_flops_percent:.3f} %",
        f"{row.extra_params:,.0f} ({row.extra_params_percent:.2f} %)",
        f"{row.extra_hbm_percent:.2f} %",
        *_percents(seen),
        f"{row.extra_collective_bytes / 2**20:.2f} MiB",
      ]
    )
  header = [
    "model",
    "extra FLOPs",
    "extra parameters",
    "extra HBM, formula",
    "reserved, TPU compiler",
    "alive at once",
    "gradient sum a step",
  ]
  return committed.markdown(header, rows)


def _percents(seen: pd.Series | None) -> list[str]:
  if seen is None:
    return ["not compiled", "not compiled"]
  return [f"{seen[name]:.2f} %" for name in ("extra_hbm_percent", "extra_peak_percent")]


def answer() -> list[question.Claim]:
  """The three targets at 70B."""
  row = targets().set_index("scale").loc[_SCALE]
  seen, flops = _compiled(_SCALE), row["extra_flops_percent"]
  hbm = row["extra_hbm_percent"] if seen is None else seen["extra_hbm_percent"]
  said = "by formula"
  if seen is not None:
    said = f"reserved by the TPU compiler, {seen['extra_peak_percent']:.2f} % alive at once"
  at = f"M = {_ATOMS}, k = {_KEPT}, R = {_RANK}, {_SCALE}"
  routed = (checked()["routed_collectives"] > 0).sum()
  return [
    question.Claim(
      f"under 1 % more FLOPs than LoRA ({at})",
      "supported" if flops < 1 else "not supported",
      f"{flops:.3f} %, counted by formula",
    ),
    question.Claim(
      f"under 1 % more memory a chip than LoRA ({at})",
      "supported" if hbm < 1 else "not supported",
      f"{hbm:.2f} % {said}, {row['extra_hbm_percent']:.2f} % by formula",
    ),
    question.Claim(
      f"no collective on the routed path ({at})",
      "inconclusive"
      if seen is None
      else "not supported"
      if seen["routed_collectives"]
      else "supported",
      "not compiled"
      if seen is None
      else f"{seen['routed_collectives']:.0f} in the loop over"
      f" blocks; {routed:.0f} of the {len(checked())} compiled points have one",
    ),
  ]


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  figure.draw(committed.csv("scaling", "analytic"), checked(), target)


QUESTION = question.Question(
  name="scaling",
  caption="FLOPs of a training step and bytes of memory a chip beyond LoRA of the same rank, in per"
  " cent, over the number of atoms M, on Llama 3 shapes with 64 rows of 4096 tokens, TPU v5p."
  " Lines are the formulas, rings what the TPU compiler reports; the black line is the target of"
  " 1 %. There are no seeds and no intervals: the counts are exact for a program.",
  study="scaling",
  command="python -m experiments.scaling --compile",
  draw=draw,
  tables={"scaling": table},
  answer=answer,
)
