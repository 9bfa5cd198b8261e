"""What is forgotten, and what helps, when tasks arrive one after another?

A stream of tasks, with frozen atoms and with free ones: `docs/studies/stream.md`.

  python -m experiments stream --workdir=runs/stream
  python -m experiments stream
"""

from matplotlib import figure

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.analysis import stream_figure, stream_tables

_FREE, _DIFFERENCE = "Queryable, free atoms", " - LoRA"
_FROZEN = "Queryable, atoms frozen after the first"


def train(work: study_lib.Work) -> None:
  """Trains what the work directory lacks, and writes the tidy tables."""
  from experiments import resumable_training
  from experiments.analysis import stream_training

  bench, points = resumable_training.prepare(work, stream_training.unit_count)
  stream_tables.write(stream_training.run(bench, points), work.results)


def summarise(results: committed.Results) -> str:
  """Writes summary.csv and summary.md: quantities of all arms, and differences to LoRA."""
  summary = stream_tables.summarise(stream_tables.read(results))
  results.write("summary.csv", summary)
  return results.write_text("summary.md", stream_tables.markdown(summary))


def table(results: committed.Results) -> str:
  """Every quantity of every arm, with the paired difference to LoRA where there is one."""
  rows, cells = results.table("summary.csv"), []
  index = rows.set_index(["task", "arm", "quantity"])
  for row in rows[~rows["quantity"].str.endswith(_DIFFERENCE)].to_dict("records"):
    key = (row["task"], row["arm"], row["quantity"] + _DIFFERENCE)
    against = index.loc[key] if key in index.index else None
    cells.append(
      [
        row["task"].replace("_", " "),
        row["arm"],
        row["quantity"],
        comparisons.mean_interval(row, 3),
        "" if against is None else f"{comparisons.mean_interval(against, 3)}, p {against['p']:.3f}",
      ]
    )
  header = ["stream", "arm", "quantity", "mean [95 % interval]", "minus LoRA's"]
  return comparisons.markdown(header, cells)


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """Whether Queryable LoRA forgets less than LoRA, learns better, and freezing its atoms helps.

  Rule: supported where Holm's p is below 0.05 and the interval excludes zero in every stream, in
  part where in some.
  """
  forgets, unseen = "backward transfer", "forward transfer"
  with_frozen_atoms = "forgets less than LoRA with its atoms frozen after the first part"
  claim_list = [
    _claim(results, "forgets less than LoRA (backward transfer)", _FREE, forgets, up=True),
    _claim(results, "learns a new part better than LoRA", _FREE, "error when learned", up=False),
    _claim(
      results,
      "makes unseen parts better than LoRA does (forward transfer)",
      _FREE,
      unseen,
      up=True,
    ),
    _claim(results, with_frozen_atoms, _FROZEN, forgets, up=True),
  ]
  return [claim for claim in claim_list if claim]


def _claim(
  results: committed.Results, claim: str, arm: str, quantity: str, up: bool
) -> study_lib.Claim | None:
  """A claim from the difference to LoRA in each stream; None while the arm is not trained.

  Args:
    up: whether more is better.
  """
  rows = results.table("summary.csv")
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
    f"{row['task'].replace('_', ' ')} {comparisons.mean_interval(row)}, p {row['p']:.3f}"
    for row in rows.to_dict("records")
  )
  return study_lib.Claim(claim, verdict, evidence)


def draw(results: committed.Results) -> figure.Figure:
  """Errors along the stream, transfers, and the search."""
  return stream_figure.draw(stream_tables.read(results), results.table("summary.csv"))


STUDY = study_lib.Study(
  name="stream",
  question="What is forgotten, and what helps, when tasks arrive one after another?",
  about="The parts of a task arrive one after another, in an order per seed, and nothing of"
  " earlier parts is kept. After each part the errors on all parts are measured. Adapters with"
  " frozen atoms are compared with free ones and with LoRA; ten seeds each.",
  config="configs/stream.py",
  results="stream",
  claims=claims,
  tables={"stream": table},
  caption="Test error (units of the source's variance) on the parts seen so far along a stream,"
  " transfers as defined in docs/studies/stream.md, and what the search saw at each learning"
  " rate. Ten seeds, 95 % bootstrap intervals.",
  draw=draw,
  summarise=summarise,
  train=train,
  position=110,
)
