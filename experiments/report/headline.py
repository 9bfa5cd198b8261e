"""The report's first sentences, generated from the summary: whoever wins, ties or loses."""

import dataclasses

import numpy as np
import pandas as pd

from experiments.report import inputs, measure, style, tables
from qlora_jax.studies import statistics


@dataclasses.dataclass(frozen=True)
class Headline:
  """One sentence to lead with, and those that qualify it."""

  lead: str
  details: tuple[str, ...]


def compared(summary: pd.DataFrame) -> pd.DataFrame:
  """The rows of each data set's subject, one for each baseline, also where its runs diverged."""
  present = summary.groupby("task")["arm"].unique()
  subjects = summary["task"].map({t: style.subject(t, methods) for t, methods in present.items()})
  own = summary["arm"] == subjects
  return summary[own & ~summary["baseline"].isin([""]) & (summary["baseline"] != summary["arm"])]


def write(summary: pd.DataFrame) -> Headline:
  """The headline of a summary table."""
  # The last baseline of a task is the closest match: on multi_target, LoRA with the instruction.
  own = compared(summary).groupby(inputs.SETTING).tail(1)
  of, details = measure.of(summary), []
  if own.empty and summary["arm"].nunique() == 1:
    lead, *details = _alone(summary, of)
  elif own.empty:
    lead = (
      "This study does not compare Queryable with another method, so it has no headline result."
    )
  else:
    lead, *details = _compare(own, of)
    details += [_further(own, of), _before_and_after(own, of), _steadiness(own, summary, of)]
  details.append(_winners(summary, of))
  details += _warnings(summary)
  return Headline(lead, tuple(d for d in details if d))


def _alone(summary: pd.DataFrame, of: measure.Measure) -> tuple[str, str, str]:
  """A study of one method: a lead, its further quantities, and how far to trust it."""
  row = summary.iloc[0]
  name, after = row["label"], row[of.key]
  before = row[of.base] if of.base else np.nan
  value = tables.value(of)
  if len(summary) > 1:
    lead = f"{name} alone on {data_sets(len(summary))}: the study compares it with no other method."
  elif not np.isfinite(after):
    lead = f"{name} has no finite {of.noun} on {row['setting']}."
  elif not np.isfinite(before):
    lead = f"{name} ends with {of.noun} {value(after)}{of.unit} on {row['setting']}."
  elif before == after:
    lead = f"{name} leaves {of.noun} at {value(after)}{of.unit} on {row['setting']}."
  else:
    lead = (
      f"{name} {'raises' if after > before else 'lowers'} {of.noun} from {value(before)}{of.unit} "
      f"to {value(after)}{of.unit} on {row['setting']}."
    )
  one = summary["num_seeds"].max() == 1
  return lead, _before_and_after(summary, of), "One seed: no interval." if one else ""


def _before_and_after(rows: pd.DataFrame, of: measure.Measure) -> str:
  """The further quantities of one method on one data set, where a study has them."""
  if len(rows) > 1:
    return ""
  row, parts = rows.iloc[0], []
  for also in of.also:
    after, before = row[also.key], row[also.base] if also.base else np.nan
    if np.isfinite(after):
      value = tables.value(also)
      start = f"{value(before)} before training, " if np.isfinite(before) else ""
      parts.append(f"{also.name}: {start}{value(after)} after")
  return f"{row['label']}, {'; '.join(parts)}." if parts else ""


def _further(rows: pd.DataFrame, of: measure.Measure) -> str:
  """The paired differences in the further quantities, for a study of one data set."""
  if len(rows) > 1:
    return ""
  row, parts = rows.iloc[0], []
  for also in of.also:
    ends = [row[f"{also.key}_difference{end}"] for end in ("", "_low", "_high")]
    if np.isfinite(ends[0]):
      verdict = tables.verdict(ends, lower=also.lower)
      verdict = "one seed: no interval" if verdict == "too few seeds" else verdict
      shown = tables.with_interval(*ends, tables.contrast(also))
      parts.append(f"{also.name} {shown} ({verdict})")
  return f"The same comparison in other numbers: {'; '.join(parts)}." if parts else ""


def _compare(rows: pd.DataFrame, of: measure.Measure) -> tuple[str, str, str]:
  """A lead, a sentence of numbers, and one that says which methods the names stand for."""
  name, other = _common_name(rows["arm"]), _common_name(rows["baseline"])
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
    lead = f"No clear difference in {of.noun} between {name} and {other} on {on}."
  elif better and not worse:
    lead = f"{name} has a {of.better} {of.noun} than {other} on {_of(better, rows)}."
  elif worse and not better:
    lead = f"{name} has a {of.worse} {of.noun} than {other} on {_of(worse, rows)}."
  else:
    lead = (
      f"Compared with {other}, {name} has a {of.better} {of.noun} on {better} and a {of.worse} one "
      f"on {worse} of {on}."
    )
  if 0 < diverged < total:
    lead = f"{lead[:-1]}; on {diverged}, a final run of {name} diverged."
  counts = better, worse, unclear, diverged
  return lead, _numbers(rows, counts, of), _stands_for(rows, name, other)


def _numbers(rows: pd.DataFrame, counts: tuple[int, int, int, int], of: measure.Measure) -> str:
  """The sentence of counts, sizes and seeds behind the lead."""
  pairs = rows.loc[rows["num_pairs"] > 0, "num_pairs"]
  if pairs.empty:
    return ""
  better, worse, unclear, diverged = counts
  ratio = _parameter_ratio(rows)
  if len(rows) == 1:
    row = rows.iloc[0]
    ends = (row[of.contrast], row[f"{of.contrast}_low"], row[f"{of.contrast}_high"])
    interval = f"{tables.with_interval(*ends, tables.contrast(of))} {of.contrast_unit}"
    how = "one seed: no interval"
    if np.isfinite(ends[1]):
      how = f"paired, 95 % {_kind(pairs)} interval over {seeds(pairs)}"
    return (
      f"The difference {'of the other runs ' if diverged else ''}is {interval} ({how}), with "
      f"{ratio}."
    )
  parts = [f"{better} {of.better}", f"{worse} {of.worse}", f"{unclear} not significant"]
  parts += [f"{diverged} with a diverged run"] if diverged else []
  return (
    f"Of {data_sets(len(rows))}: {', '.join(parts)}, by paired 95 % {_kind(pairs)} intervals over "
    f"{seeds(pairs)}. "
    f"The median difference {'over the runs that finished ' if diverged else ''}is "
    f"{tables.contrast(of)(rows[of.contrast].median())} {of.contrast_unit}, with {ratio}."
  )


def _kind(pairs: pd.Series) -> str:
  """The name of the intervals over so many seeds; see `statistics.paired_interval`."""
  few = pairs < statistics.FEW
  return "Student" if few.all() else "Student or bootstrap" if few.any() else "bootstrap"


def _steadiness(rows: pd.DataFrame, summary: pd.DataFrame, of: measure.Measure) -> str:
  """How often the search diverged and how widely the seeds spread, next to the baselines."""
  columns = [*inputs.SETTING, "arm", "diverged_share", "spread"]
  others = summary[columns].drop_duplicates([*inputs.SETTING, "arm"])
  pairs = rows.merge(
    others.rename(columns={"arm": "baseline"}),
    on=[*inputs.SETTING, "baseline"],
    suffixes=("", "_other"),
  )
  name, other = _common_name(rows["arm"]), _common_name(rows["baseline"])
  parts = []
  ours, theirs = pairs["diverged_share"].mean(), pairs["diverged_share_other"].mean()
  if np.isfinite(ours) and np.isfinite(theirs):
    parts.append(
      f"{tables.share(ours)} of the search runs of {name} diverged, {tables.share(theirs)} of "
      f"those of {other}"
    )
  ratio = (pairs["spread"] / pairs["spread_other"]).replace(np.inf, np.nan).median()
  if np.isfinite(ratio):
    parts.append(f"over the seeds its {of.mean} spreads {ratio:.2g} times as widely")
  return f"Steadiness: {'; '.join(parts)}." if parts else ""


def _common_name(methods: pd.Series) -> str:
  """The one method's label; a family's name where data sets differ in the variant."""
  labels = list(dict.fromkeys(style.method(m).label for m in methods))
  if len(labels) == 1:
    return labels[0]
  for family in ("queryable", "lora"):
    if methods.str.startswith(family).all():
      return style.method(family).label
  return "the baseline"


def _stands_for(rows: pd.DataFrame, name: str, other: str) -> str:
  """Names the variants behind a family's name, data set by data set."""
  sentences = []
  for (method, baseline), group in rows.groupby(["arm", "baseline"], sort=False):
    pairs = ((name, style.method(method).label), (other, style.method(baseline).label))
    parts = [f"{short} stands for {full}" for short, full in pairs if short != full]
    if parts:
      tasks = ", ".join(dict.fromkeys(task.replace("_", " ") for task in group["task"]))
      sentences.append(f"On {tasks}, {' and '.join(parts)}.")
  return " ".join(sentences)


def _parameter_ratio(rows: pd.DataFrame) -> str:
  ratio = (rows["trainable_params"] / rows["baseline_params"]).median()
  if 0.95 <= ratio <= 1.05:
    return "about as many trainable parameters"
  return f"{ratio:.2g} times the trainable parameters"


def _winners(summary: pd.DataFrame, of: measure.Measure) -> str:
  """Which methods had the best mean, and how often; those that diverged do not count."""
  rows = summary.drop_duplicates([*inputs.SETTING, "arm"])
  rows = rows[np.isfinite(rows[of.key]) & (rows["failed_runs"] == 0)]
  if rows["arm"].nunique() < 3:
    return ""
  means = (rows[of.key] if of.lower else -rows[of.key]).groupby([rows[c] for c in inputs.SETTING])
  best = rows.loc[means.idxmin(), "label"].value_counts()
  names = [f"{label} ({times})" if len(best) > 1 else label for label, times in best.items()]
  mean = f"{of.best} mean {of.mean}"
  if len(best) == 1:
    one = len(rows[inputs.SETTING].drop_duplicates()) == 1
    return f"The {mean}{'' if one else ' on every data set'} is {names[0]}'s."
  first = ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
  return f"The {mean}, by number of data sets: {first}."


def _warnings(summary: pd.DataFrame) -> list[str]:
  paired = summary[summary["num_pairs"] > 0]
  if paired.empty:
    return []
  warnings = []
  fewest = paired.loc[paired["num_pairs"] > 1, "num_pairs"].min()  # one seed has no interval
  if fewest < statistics.FEW:
    warnings.append(
      f"With as few as {seeds([fewest])}, the intervals and p-values are Student's: they suppose "
      "that differences scatter about normally, and they are wide, so that 'no difference' says "
      "little."
    )
  if len(paired) >= 20:
    warnings.append(
      f"The study makes {len(paired)} comparisons; at 95 % about {round(0.05 * len(paired))} "
      "would come out clear by chance alone. The full table has p-values corrected for that."
    )
  own = summary.drop_duplicates([*inputs.SETTING, "arm"])
  if own["rate_at_edge"].any():
    names = ", ".join(own.loc[own["rate_at_edge"], "label"].drop_duplicates().head(6))
    warnings.append(
      f"In {int(own['rate_at_edge'].sum())} of {int(own['learning_rate'].notna().sum())} cases the "
      f"chosen learning rate is the lowest or highest one tried ({names}): rates beyond it might "
      "do better."
    )
  return warnings


def data_sets(number: int) -> str:
  return f"{number} data set" + ("" if number == 1 else "s")


def _of(number: int, rows: pd.DataFrame) -> str:
  if len(rows) == 1:
    return rows["setting"].iloc[0]
  if number == len(rows):
    return "both data sets" if number == 2 else f"all {number} data sets"
  return f"{number} of {data_sets(len(rows))}"


def seeds(numbers) -> str:
  low, high = int(min(numbers)), int(max(numbers))
  if low != high:
    return f"{low} to {high} seeds"
  return f"{low} seed" + ("" if low == 1 else "s")
