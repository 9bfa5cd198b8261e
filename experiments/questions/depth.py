"""Does the shared memory share structure across depth?"""

import pathlib

import pandas as pd

from experiments.depth import figure, tables
from experiments.questions import committed, question

_FOLDER = committed.RESULTS / "depth"
_ARM = "depth regimes queryable"  # whose routing gain the claims on weights need
_SHOWN = (
  ("similarity", "trained", "blocks, cosine, excess"),
  ("similarity", "trained - untrained", "blocks, cosine, excess"),
  ("removal", "trained", "blocks an atom serves"),
  ("removal", "trained", "blocks an atom serves, excess"),
  ("removal", "trained", "usage and rise, blocks and atoms"),
)


def ends(row, digits: int = 2) -> str:
  """`mean [low, high]`."""
  return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]".replace(
    "-", "−"
  )


def _rows(kind: str, what: str, quantity: str) -> pd.DataFrame:
  rows = committed.csv("depth", "summary")
  return rows[(rows["kind"] == kind) & (rows["what"] == what) & (rows["quantity"] == quantity)]


def table() -> str:
  """Similarity of the blocks' routing and removal of atoms, by setting."""
  rows = [
    [row["setting"].replace("_", " "), quantity, what, ends(row)]
    for kind, what, quantity in _SHOWN
    for row in _rows(kind, what, quantity).to_dict("records")
  ]
  return committed.markdown(["setting", "quantity", "network", "mean [95 % interval]"], rows)


def transfer() -> str:
  """Test error on a new task by what is taken from the source and what is trained."""
  rows = committed.csv("depth", "summary")
  rows = rows[(rows["kind"] == "transfer") & (rows["quantity"] == "test mse")]
  return committed.markdown(
    ["source → new task", "arm", "test MSE"],
    [
      [row["setting"].replace("_", " "), row["what"], ends(row, 3)]
      for row in rows.to_dict("records")
    ],
  )


def answer() -> list[question.Claim]:
  """Whether training makes blocks share atoms, and an atom serve many blocks."""

  def told(rows: pd.DataFrame) -> str:
    return "; ".join(
      f"{row['setting'].replace('_', ' ')} {ends(row)}" for row in rows.to_dict("records")
    )

  def verdict(rows: pd.DataFrame) -> str:
    if rows.empty:
      return "inconclusive"
    if (rows["low"] > 0).all():
      return "supported"
    return "supported in part" if (rows["low"] > 0).any() else "not supported"

  learnt = _rows("similarity", "trained - untrained", "blocks, cosine, excess")
  serves = _rows("removal", "trained", "blocks an atom serves, excess")
  usage = _rows("removal", "trained", "usage and rise, blocks and atoms")
  moved = committed.csv("depth", "summary")
  moved = moved[
    (moved["kind"] == "transfer")
    & (moved["what"] == "source memory, all trained")
    & (moved["quantity"] == "difference to all from scratch, %")
  ]
  return [
    question.Claim(
      "training makes blocks share atoms (centred cosine)", verdict(learnt), told(learnt), _ARM
    ),
    question.Claim(
      "an atom serves more blocks than with renamed atoms", verdict(serves), told(serves), _ARM
    ),
    question.Claim(
      "usage foretells the cost of removal (rank correlation)", verdict(usage), told(usage)
    ),
    question.Claim(
      "a trained memory helps a new task, all trained (change of the error, %)",
      verdict(moved.assign(low=-moved["high"])),
      told(moved),
    ),
  ]


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  figure.draw(tables.read(_FOLDER), committed.csv("depth", "summary"), target)


QUESTION = question.Question(
  name="depth",
  caption="a: mean routing weights of one seed by block, part of the task and atom. b: similarity"
  " of two blocks' weights beyond blocks whose atoms are renamed. c: an atom's use in a block and"
  " the rise of the test error, in percent, when it is removed there. d: test error on a new task"
  " by what is taken from a source. Ten seeds, 95 % bootstrap intervals.",
  study="depth",
  command="python -m experiments.depth --workdir=runs/depth",
  draw=draw,
  tables={"depth": table, "transfer": transfer},
  answer=answer,
)
