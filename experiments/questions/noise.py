"""Does routing still help with other noise, and with few training rows?"""

import functools
import pathlib

import pandas as pd

from experiments.noise import figure
from experiments.questions import committed, factorial, question


@functools.cache
def differences() -> pd.DataFrame:
  """A row a setting, from the committed table."""
  return pd.read_csv(committed.RESULTS / "noise" / "differences.csv")


def table() -> str:
  """Every setting."""
  rows = [
    [
      row["task"], row["noise_kind"].replace("_", " "), f"{row['noise_level']:g}",
      f"{row['train_rows']:,}", f"{row['lora_error']:.4f}", f"{row['error']:.4f}",
      factorial.ends(row), f"{row['p_holm']:.3f}", row["verdict"],
    ]
    for row in differences().to_dict("records")
  ]  # fmt: skip
  header = ["task", "noise", "level", "training rows", "LoRA's test MSE", "Queryable LoRA's",
            "difference", "p (Holm)", "verdict"]  # fmt: skip
  return committed.markdown(header, rows)


def answer() -> list[tuple[str, str, str]]:
  """In how many settings the error is lower, by task and by number of rows."""
  found = []
  for task, own in differences().groupby("task", sort=False):
    for count, part in own.groupby("train_rows"):
      better, worse = ((part["verdict"] == word).sum() for word in ("better", "worse"))
      verdict = (
        "supported" if better == len(part) else "not supported" if not better
        else "supported in part"
      )  # fmt: skip
      low, high = part["percent"].min(), part["percent"].max()
      found.append((
        f"lower error than LoRA on {task} with {count:,} training rows", verdict,
        f"lower in {better}, higher in {worse} of {len(part)} kinds and levels of noise; means from"
        f" {low:+.1f} to {high:+.1f} %".replace("-", "−"),
      ))  # fmt: skip
  return found


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  figure.draw(differences(), target)


QUESTION = question.Question(
  name="noise_and_rows",
  caption="Difference in noise-free test error of Queryable LoRA to LoRA in per cent, with 95 %"
  " paired bootstrap intervals over ten seeds, against the number of training rows; a panel a kind"
  " of noise, a line a task and noise level (standard deviation of the noise in units of the"
  " target's). Hollow marks are not told apart from zero (Holm's p at a noise level of a task).",
  study="noise",
  command="python launch.py --config=configs/noise.py --workdir=runs/noise --sweep",
  draw=draw,
  tables={"noise_and_rows": table},
  answer=answer,
)
