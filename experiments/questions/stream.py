"""What is forgotten, and what helps, when tasks arrive one after another?"""

import pathlib

from experiments.questions import committed, depth, question
from experiments.stream import figure, tables

_FOLDER = committed.RESULTS / "stream"
_FREE, _DIFFERENCE = "Queryable, free atoms", " - LoRA"
_FROZEN = "Queryable, atoms frozen after the first"


def table() -> str:
  """Every quantity of every arm, with the paired difference to LoRA where there is one."""
  rows, found = committed.csv("stream", "summary"), []
  index = rows.set_index(["task", "arm", "quantity"])
  for row in rows[~rows["quantity"].str.endswith(_DIFFERENCE)].to_dict("records"):
    key = (row["task"], row["arm"], row["quantity"] + _DIFFERENCE)
    against = index.loc[key] if key in index.index else None
    found.append(
      [
        row["task"].replace("_", " "),
        row["arm"],
        row["quantity"],
        depth.ends(row, 3),
        "" if against is None else f"{depth.ends(against, 3)}, p {against['p']:.3f}",
      ]
    )
  header = ["stream", "arm", "quantity", "mean [95 % interval]", "minus LoRA's"]
  return committed.markdown(header, found)


def answer() -> list[question.Claim]:
  """Whether Queryable LoRA forgets less than LoRA, learns better, and freezing its atoms helps."""
  found = [
    _claim("forgets less than LoRA (backward transfer)", _FREE, "backward transfer", up=True),
    _claim("learns a new part better than LoRA", _FREE, "error when learned", up=False),
    _claim(
      "makes unseen parts better than LoRA does (forward transfer)",
      _FREE,
      "forward transfer",
      up=True,
    ),
    _claim(
      "forgets less than LoRA with its atoms frozen after the first part",
      _FROZEN,
      "backward transfer",
      up=True,
    ),
  ]
  return [each for each in found if each]


def _claim(claim: str, arm: str, quantity: str, up: bool) -> question.Claim | None:
  """Judges a difference to LoRA stream by stream; `up` where more is better. None: not run yet."""
  rows = committed.csv("stream", "summary")
  rows = rows[(rows["arm"] == arm) & (rows["quantity"] == quantity + _DIFFERENCE)]
  if rows.empty:
    return None
  clear = rows[(rows["p"] < 0.05) & ((rows["low"] > 0) | (rows["high"] < 0))]
  good = (clear["mean"] > 0) == up
  verdict = "inconclusive"
  if len(clear):
    verdict = "supported" if good.all() and len(clear) == len(rows) else "supported in part"
    verdict = verdict if good.any() else "not supported"
  evidence = "; ".join(
    f"{row['task'].replace('_', ' ')} {depth.ends(row)}, p {row['p']:.3f}"
    for row in rows.to_dict("records")
  )
  return question.Claim(claim, verdict, evidence)


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  figure.draw(tables.read(_FOLDER), committed.csv("stream", "summary"), target)


QUESTION = question.Question(
  name="stream",
  caption="Test error (units of the source's variance) on the parts seen so far along a stream,"
  " transfers as defined in experiments/stream/README.md, and what the search saw at each learning"
  " rate. Ten seeds, 95 % bootstrap intervals.",
  study="stream",
  command="python -m experiments.stream --workdir=runs/stream",
  draw=draw,
  tables={"stream": table},
  answer=answer,
)
