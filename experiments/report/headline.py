"""The report's first sentences, generated from the summary: whoever wins, ties or loses."""

import dataclasses

import numpy as np
import pandas as pd

from experiments.report import inputs, style, tables

FEW_SEEDS = 6  # with 5, the smallest possible p-value is 0.0625


@dataclasses.dataclass(frozen=True)
class Headline:
  """One sentence to lead with, and those that qualify it."""

  lead: str
  details: tuple[str, ...]


def subject_of(summary: pd.DataFrame) -> str | None:
  """The method that the report is about: fixed in advance, never the one that did best."""
  present = style.ordered(summary["method"])
  if style.ROUTED_REFERENCE in present:
    return style.ROUTED_REFERENCE
  return next((m for m in present if m.startswith(style.ROUTED_REFERENCE)), None)


def compared(summary: pd.DataFrame, method: str | None) -> pd.DataFrame:
  """The rows that compare `method` with another, also where all of its runs diverged."""
  return summary[(summary["method"] == method) & ~summary["baseline"].isin(["", method])]


def write(summary: pd.DataFrame) -> Headline:
  """The headline of a summary table."""
  subject = subject_of(summary)
  own = compared(summary, subject)
  details = []
  if own.empty:
    lead = (
      "This study does not compare Queryable with another method, so it has no headline result."
    )
  else:
    # One sentence a baseline; the one met on most data sets leads.
    sizes = own["baseline"].value_counts()
    order = sorted(sizes.index, key=lambda b: (-sizes[b], style.ordered(sizes.index).index(b)))
    sentences = [_compare(subject, b, own[own["baseline"] == b]) for b in order]
    lead = sentences[0][0]
    details.append(sentences[0][1])
    details += [" ".join(pair) for pair in sentences[1:]]
  details.append(_winners(summary))
  details += _warnings(summary)
  return Headline(lead, tuple(d for d in details if d))


def _compare(subject: str, baseline: str, rows: pd.DataFrame) -> tuple[str, str]:
  """A lead and a sentence of counts for one baseline."""
  name, other = style.method(subject).label, style.method(baseline).label
  total = len(rows)
  verdicts = rows["verdict"].value_counts()
  better, worse = int(verdicts.get("better", 0)), int(verdicts.get("worse", 0))
  diverged = int(verdicts.get("diverged", 0))
  unclear = total - better - worse - diverged
  on = data_sets(total) if total > 1 else rows["setting"].iloc[0]
  if diverged == total:
    lead = f"A final run of {name} diverged on {_of(diverged, rows)}."
  elif (rows["verdict"] == "too few seeds").all():
    lead = f"Too few seeds to tell {name} and {other} apart on {on}."
  elif not better and not worse:
    lead = f"No clear difference in test error between {name} and {other} on {on}."
  elif better and not worse:
    lead = f"{name} has a lower test error than {other} on {_of(better, rows)}."
  elif worse and not better:
    lead = f"{name} has a higher test error than {other} on {_of(worse, rows)}."
  else:
    lead = (
      f"Compared with {other}, {name} has a lower test error on {better} and a higher one on "
      f"{worse} of {on}."
    )
  ratio = _parameter_ratio(rows)
  pairs = rows.loc[rows["num_pairs"] > 0, "num_pairs"]
  if pairs.empty:
    return lead, ""
  if total == 1:
    row = rows.iloc[0]
    interval = tables.with_interval(
      row["relative"], row["relative_low"], row["relative_high"], tables.percent
    )
    return lead, (
      f"The difference {'of the other runs ' if diverged else ''}is {interval} % (paired, 95 % "
      f"bootstrap interval over {seeds(pairs)}){ratio}."
    )
  if 0 < diverged < total:
    lead = f"{lead[:-1]}; on {diverged}, a final run of {name} diverged."
  parts = [f"{better} lower", f"{worse} higher", f"{unclear} not told apart"]
  parts += [f"{diverged} where a run of {name} diverged"] if diverged else []
  sentence = (
    f"Of {on}: {', '.join(parts)}, by paired 95 % bootstrap intervals over "
    f"{seeds(pairs)}. "
    f"The median difference {'over the runs that finished ' if diverged else ''}is "
    f"{tables.percent(rows['relative'].median())} %{ratio}."
  )
  return lead, sentence


def _parameter_ratio(rows: pd.DataFrame) -> str:
  ratio = (rows["trainable_params"] / rows["baseline_params"]).median()
  return f", with {ratio:.2g} times the trainable parameters" if np.isfinite(ratio) else ""


def _winners(summary: pd.DataFrame) -> str:
  """Which methods had the lowest mean error, and how often; those that diverged do not count."""
  rows = summary.drop_duplicates([*inputs.SETTING, "method"])
  rows = rows[np.isfinite(rows["test_mse"]) & (rows["failed_runs"] == 0)]
  if rows["method"].nunique() < 3:
    return ""
  best = rows.loc[rows.groupby(inputs.SETTING)["test_mse"].idxmin(), "label"].value_counts()
  names = [f"{label} ({times})" if len(best) > 1 else label for label, times in best.items()]
  if len(best) == 1:
    return f"The lowest mean error on every data set is {names[0]}'s."
  shown = ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
  return f"The lowest mean error, by number of data sets: {shown}."


def _warnings(summary: pd.DataFrame) -> list[str]:
  paired = summary[summary["num_pairs"] > 0]
  if paired.empty:
    return []
  warnings = []
  fewest = int(paired["num_pairs"].min())
  if fewest < FEW_SEEDS:
    warnings.append(
      f"With as few as {seeds([fewest])}, 95 % bootstrap intervals are too narrow and hold the "
      "true value less often than they say: read the verdicts as provisional."
    )
  if len(paired) >= 20:
    warnings.append(
      f"The study makes {len(paired)} comparisons; at 95 % about {round(0.05 * len(paired))} "
      "would come out clear by chance alone. The full table has p-values corrected for that."
    )
  return warnings


def data_sets(number: int) -> str:
  return f"{number} data set" + ("" if number == 1 else "s")


def _of(number: int, rows: pd.DataFrame) -> str:
  if len(rows) == 1:
    return rows["setting"].iloc[0]
  return f"{'all' if number == len(rows) else f'{number} of'} {data_sets(len(rows))}"


def seeds(numbers) -> str:
  low, high = int(min(numbers)), int(max(numbers))
  if low != high:
    return f"{low} to {high} seeds"
  return f"{low} seed" + ("" if low == 1 else "s")
