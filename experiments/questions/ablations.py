"""What changes the error when one part is changed?"""

import pathlib

import pandas as pd

from experiments.ablations import figure
from experiments.questions import committed, factorial, question


def compared() -> pd.DataFrame:
  """The levels that have a reference."""
  levels = committed.csv("ablations", "levels")
  return levels[levels["percent"].notna()]


def table() -> str:
  """Every level beside its reference."""
  rows = [
    [
      row["task"].replace("_", " "),
      str(row["factor"]),
      "" if pd.isna(row["level"]) else str(row["level"]),
      f"{row['trainable_params']:,.0f}" + ("" if row["matched"] else " (not matched)"),
      f"{row['mse']:.3f}",
      factorial.ends(row),
      f"{row['p_holm']:.3f}",
    ]
    for row in compared().to_dict("records")
  ]
  header = ["task", "factor", "level", "trainable", "test MSE", "change", "p (Holm)"]
  return committed.markdown(header, rows)


def answer() -> list[question.Claim]:
  """What makes the error clearly higher or lower, task by task, parameters matched."""
  found = []
  for task, own in compared().groupby("task", sort=False):
    own = own[own["matched"].astype(bool)]
    clear = own[(own["p_holm"] < 0.05)]
    for word, part in (
      ("higher", clear[clear["percent_low"] > 0]),
      ("lower", clear[clear["percent_high"] < 0]),
    ):
      names = [f"{row.factor}: {row.level} ({row.percent:+.0f} %)" for row in part.itertuples()]
      found.append(
        question.Claim(
          f"{task.replace('_', ' ')}: a change gives a clearly {word} error",
          f"{len(part)} of {len(own)} changes",
          ", ".join(names).replace("-", "−") or "none",
        )
      )
  return found


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  figure.draw(committed.csv("ablations", "levels"), target)


QUESTION = question.Question(
  name="ablations",
  caption="Change of test error in per cent when one thing is changed in Queryable LoRA, with"
  " paired 95 % bootstrap intervals over ten seeds; coloured where Holm's p within a factor is"
  " below .05. Diamonds do not have the reference's number of parameters.",
  study="ablations",
  command="python launch.py --config=configs/ablations.py --workdir=runs/ablations --sweep",
  draw=draw,
  tables={"ablations": table},
  answer=answer,
)
