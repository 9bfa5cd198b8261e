"""Does the shared memory share structure across depth, and can a trained one be used again?

Trains networks, measures their routing, removes atoms from them, and moves their memory to other
tasks: `docs/studies/depth.md`.

  python -m experiments depth --workdir=runs/depth
  python -m experiments depth
"""

import pandas as pd
from matplotlib import figure

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.analysis import depth_figure, depth_tables

_ARM = "depth regimes queryable"  # whose routing gain the claims on weights need
_SHOWN = (
  ("similarity", "trained", "blocks, cosine, excess"),
  ("similarity", "trained - untrained", "blocks, cosine, excess"),
  ("removal", "trained", "blocks an atom serves"),
  ("removal", "trained", "blocks an atom serves, excess"),
  ("removal", "trained", "usage and rise, blocks and atoms"),
)


def train(work: study_lib.Work) -> None:
  """Trains and measures what the work directory lacks, and writes the tidy tables."""
  from experiments import resumable_training
  from experiments.analysis import depth_training

  bench, points = resumable_training.prepare(work, depth_training.unit_count)
  depth_tables.write(depth_training.run(bench, points), work.results)


def summarise(results: committed.Results) -> str:
  """Writes summary.csv and summary.md: means over seeds with 95 % bootstrap intervals."""
  summary = depth_tables.summarise(depth_tables.read(results))
  results.write("summary.csv", summary)
  return results.write_text("summary.md", depth_tables.markdown(summary))


def _rows(results: committed.Results, kind: str, what: str, quantity: str) -> pd.DataFrame:
  rows = results.table("summary.csv")
  return rows[(rows["kind"] == kind) & (rows["what"] == what) & (rows["quantity"] == quantity)]


def table(results: committed.Results) -> str:
  """Similarity of the blocks' routing and removal of atoms, by setting."""
  rows = [
    [row["setting"].replace("_", " "), quantity, what, comparisons.mean_interval(row)]
    for kind, what, quantity in _SHOWN
    for row in _rows(results, kind, what, quantity).to_dict("records")
  ]
  return comparisons.markdown(["setting", "quantity", "network", "mean [95 % interval]"], rows)


def transfer(results: committed.Results) -> str:
  """Test error on a new task by what is taken from the source and what is trained."""
  rows = results.table("summary.csv")
  rows = rows[(rows["kind"] == "transfer") & (rows["quantity"] == "test mse")]
  return comparisons.markdown(
    ["source → new task", "arm", "test MSE"],
    [
      [row["setting"].replace("_", " "), row["what"], comparisons.mean_interval(row, 3)]
      for row in rows.to_dict("records")
    ],
  )


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """Whether training makes blocks share atoms, and an atom serve many blocks.

  Rule: supported where the interval lies above zero in every setting, in part where in some.
  """

  def evidence(rows: pd.DataFrame) -> str:
    return "; ".join(
      f"{row['setting'].replace('_', ' ')} {comparisons.mean_interval(row)}"
      for row in rows.to_dict("records")
    )

  def verdict(rows: pd.DataFrame) -> str:
    if rows.empty:
      return "inconclusive"
    if (rows["low"] > 0).all():
      return "supported"
    return "supported in part" if (rows["low"] > 0).any() else "not supported"

  learned = _rows(results, "similarity", "trained - untrained", "blocks, cosine, excess")
  serves = _rows(results, "removal", "trained", "blocks an atom serves, excess")
  usage = _rows(results, "removal", "trained", "usage and rise, blocks and atoms")
  moved = results.table("summary.csv")
  moved = moved[
    (moved["kind"] == "transfer")
    & (moved["what"] == "source memory, all trained")
    & (moved["quantity"] == "difference to all from scratch, %")
  ]
  return [
    study_lib.Claim(
      "training makes blocks share atoms (centred cosine)",
      verdict(learned),
      evidence(learned),
      _ARM,
    ),
    study_lib.Claim(
      "an atom serves more blocks than with renamed atoms", verdict(serves), evidence(serves), _ARM
    ),
    study_lib.Claim(
      "usage foretells the cost of removal (rank correlation)", verdict(usage), evidence(usage)
    ),
    study_lib.Claim(
      "a trained memory helps a new task, all trained (change of the error, %)",
      verdict(moved.assign(low=-moved["high"])),
      evidence(moved),
    ),
  ]


def draw(results: committed.Results) -> figure.Figure:
  """Usage, similarity, removal and transfer."""
  return depth_figure.draw(depth_tables.read(results), results.table("summary.csv"))


STUDY = study_lib.Study(
  name="depth",
  question="Does the shared memory share structure across depth?",
  about="The blocks' routing weights are compared with those of blocks whose atoms are renamed,"
  " atoms are removed one at a time, and a trained memory is given to another task. Ten"
  " seeds each.",
  config="configs/depth.py",
  results="depth",
  claims=claims,
  tables={"depth": table, "transfer": transfer},
  caption="a: mean routing weights of one seed by block, part of the task and atom. b: similarity"
  " of two blocks' weights beyond blocks whose atoms are renamed. c: an atom's use in a block and"
  " the rise of the test error, in percent, when it is removed there. d: test error on a new task"
  " by what is taken from a source. Ten seeds, 95 % bootstrap intervals.",
  draw=draw,
  summarise=summarise,
  train=train,
  position=100,
)
