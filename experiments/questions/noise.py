"""Is the error lower than LoRA's with other noise, and with few training rows?"""

import pathlib

from experiments.noise import figure
from experiments.questions import committed, factorial, question


def table() -> str:
  """The mean over the kinds of noise, by task, level and number of training rows."""
  single = committed.csv("noise", "differences").groupby(["task", "noise_level", "train_rows"])
  kinds = single["percent"].agg(["min", "max"])
  rows = []
  for row in committed.csv("noise", "pooled").to_dict("records"):
    low, high = kinds.loc[(row["task"], row["noise_level"], row["train_rows"])]
    rows.append(
      [
        row["task"],
        f"{row['noise_level']:g}",
        f"{row['train_rows']:,}",
        factorial.ends(row),
        f"{low:+.1f} to {high:+.1f} %".replace("-", "−"),
        f"{row['p_holm']:.3f}",
        row["verdict"],
      ]
    )
  header = [
    "task",
    "noise",
    "training rows",
    "difference to LoRA, mean of five kinds of noise",
    "single kinds",
    "p (Holm)",
    "verdict",
  ]
  return committed.markdown(header, rows)


def answer() -> list[question.Claim]:
  """Whether the error is lower, by task and number of rows, at the levels of noise."""
  verdicts = {"better": "supported", "worse": "not supported", "not significant": "inconclusive"}
  found, pooled = [], committed.csv("noise", "pooled")
  for (task, count), own in pooled.groupby(["task", "train_rows"], sort=False):
    words = [verdicts[word] for word in own["verdict"]]
    told = "; ".join(
      f"noise {row['noise_level']:g}: {factorial.ends(row)}" for row in own.to_dict("records")
    )
    found.append(
      question.Claim(
        f"lower error than LoRA on {task} with {count:,} training rows, over five kinds of noise",
        words[0]
        if len(set(words)) == 1
        else "supported in part"
        if "supported" in words
        else "not supported",
        told,
      )
    )
  return found


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  figure.draw(committed.csv("noise", "differences"), target)


QUESTION = question.Question(
  name="noise_and_rows",
  caption="Difference in noise-free test error of Queryable LoRA to LoRA in per cent, with 95 %"
  " paired bootstrap intervals over ten seeds, against the number of training rows; a panel per"
  " kind of noise, a line per task and noise level (standard deviation of the noise in units of the"
  " target's). Hollow marks are not significant (Holm's p at a noise level of a task).",
  study="noise",
  command="python launch.py --config=configs/noise.py --workdir=runs/noise --sweep",
  draw=draw,
  tables={"noise_and_rows": table},
  answer=answer,
)
