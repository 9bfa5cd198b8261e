"""Tables of the language model studies: of all ways, of pairs of methods, and of single changes."""

import pandas as pd

from experiments import committed, comparisons, routing_gain
from experiments.report import inputs, measure, style, tables
from qlora_jax.studies import statistics

PAIR = ("queryable_prior+prompt", "lora+prompt")
# Column -> heading and digits.
_SCORES = {
  "test_nats": ("nats per answer token, new wordings", 3),
  "test_seen_nats": ("known wordings", 3),
  "test_accuracy": ("exact match, new wordings, %", 1),
}
_COMBINED = {
  "validation_nats": ("validation nats", 3),
  "test_accuracy": ("exact match, new wordings, %", 1),
  "test_seen_accuracy": ("known wordings, %", 1),
}


def deciding(results: committed.Results) -> str:
  """Every way to use the instruction, beside the base and against LoRA with it in the prompt."""
  summary = results.summary
  of = measure.of(summary)
  # The last row of a method has its closest baseline.
  methods = summary.drop_duplicates([*inputs.SETTING, "arm"], keep="last")
  rows = []
  for prompted in (False, True):
    bases = methods[methods["arm"].str.contains("+prompt", regex=False) == prompted]
    if of.base and len(bases):
      name = style.method("none+prompt" if prompted else "none").label
      values = [tables.value(score)(bases[score.base].iloc[0]) for score in _accuracies(of)]
      rows.append([name, "0", "", tables.MISSING, *values, ""])
  for _, row in methods.iterrows():
    rows.append(
      [
        row["label"],
        f"{row['trainable_params']:,.0f}",
        str(row["num_seeds"]),
        _with_interval(row, "validation_nats", tables.number),
        *(_with_interval(row, score.key, tables.value(score)) for score in _accuracies(of)),
        _contrast(row, of),
      ]
    )
  header = (
    "method | trainable | seeds | validation nats | exact match, new wordings, % |"
    " known wordings, % | difference to LoRA + prompt, points"
  )
  return comparisons.markdown(header, rows)


def by_task(results: committed.Results) -> str:
  """Exact match in new wordings, task by task."""
  scores = tables.by_task(results.study)
  cells = scores[scores["split"] == "test"].pivot(index="arm", columns="name", values="accuracy")
  rows = [
    [style.method(key).label, *(f"{value:.1f}" for value in cells.loc[key])]
    for key in style.ordered(cells.index)
  ]
  return comparisons.markdown(["method", *(name.replace("_", " ") for name in cells.columns)], rows)


def rates(results: committed.Results) -> str:
  """The search: validation nats of each method at each learning rate, the chosen one in bold."""
  study = results.study
  search, chosen = (
    study.stage("search"),
    results.summary.drop_duplicates("arm").set_index("arm"),
  )
  means = search.groupby(["arm", "learning_rate"])["validation_nats"].mean().unstack()
  rows = []
  for key in style.ordered(means.index):
    rate = chosen["learning_rate"].get(key)
    texts = [(tried, tables.number(value)) for tried, value in means.loc[key].items()]
    rows.append(
      [
        style.method(key).label,
        *(f"**{text}**" if tried == rate else text for tried, text in texts),
      ]
    )
  return comparisons.markdown(["method", *(tables.plain(rate) for rate in means.columns)], rows)


def reasons(results: committed.Results) -> str:
  """One change at a time to the deciding Queryable LoRA: likelihood beside LoRA's, one seed."""
  rows = results.of("reasons").study.stage("final").set_index("arm", drop=False)
  baseline = rows.loc["lora+prompt", "validation_nats"]
  table = []
  for key, row in rows.sort_values("validation_nats").iterrows():
    difference = row["validation_nats"] - baseline
    support = row["router/effective_support"]
    table.append(
      [
        style.method(key.removesuffix("+prompt")).label,
        f"{row['trainable_params']:,.0f}",
        f"{row['rank']:.0f}",
        f"{row['validation_nats']:.3f}",
        "baseline" if key == "lora+prompt" else f"{difference:+.3f}".replace("-", "−"),
        tables.MISSING if pd.isna(support) else f"{support:.1f}",
      ]
    )
  header = (
    "Queryable + prior, but | trainable | rank | validation nats | minus LoRA's | atoms in use"
  )
  return comparisons.markdown(header, table)


def pair(results: committed.Results) -> pd.DataFrame:
  """The base, LoRA and the routed method of a study of two, with Student's paired differences.

  Columns: `method`, `label`, `trainable_params`, `learning_rate`, `seeds`, and for each of
  `test_nats`, `test_seen_nats` and `test_accuracy` the mean, and of the routed one `_difference`,
  `_low`, `_high` and `_p`.
  """
  final = results.study.stage("final")
  scores = [name for name in _SCORES if name in final]
  methods = sorted(final["arm"].unique(), key=lambda name: not name.startswith("lora"))
  tables_of = {name: final.pivot(index="seed", columns="arm", values=name) for name in scores}
  rows = [
    {
      "label": "Frozen base + prompt",
      "trainable_params": 0,
      **{name: _unit(name) * final[f"base_{name}"].mean() for name in scores},
    }
  ]
  for method in methods:
    trials = final[final["arm"] == method]
    row = {
      "arm": method,
      "label": style.method(method).label,
      "seeds": len(trials),
      **trials[["trainable_params", "learning_rate"]].iloc[0],
    }
    for name in scores:
      row[name] = _unit(name) * trials[name].mean()
      if method != methods[0]:
        differences = _unit(name) * (tables_of[name][method] - tables_of[name][methods[0]])
        interval, p_value = statistics.student(differences)
        row |= {
          f"{name}_difference": interval.mean,
          f"{name}_low": interval.low,
          f"{name}_high": interval.high,
          f"{name}_p": p_value,
        }
    rows.append(row)
  return pd.DataFrame(rows)


def _unit(score: str) -> float:
  return 100.0 if score.endswith("accuracy") else 1.0


def pair_table(results: committed.Results) -> str:
  """`pair` in Markdown."""
  rows = []
  for row in pair(results).to_dict("records"):
    rate = f"{row['learning_rate']:g}" if pd.notna(row["learning_rate"]) else "–"
    cells = [row["label"], f"{row['trainable_params']:,.0f}", rate]
    for name, (_, digits) in _SCORES.items():
      text = f"{row[name]:.{digits}f}"
      if pd.notna(row.get(f"{name}_difference")):
        ends = (f"{row[f'{name}_{end}']:+.{digits}f}" for end in ("difference", "low", "high"))
        mean, low, high = ends
        text += f" ({mean} [{low}, {high}])".replace("-", "−")
      cells.append(text)
    rows.append(cells)
  header = ["method", "trainable", "rate", *(heading for heading, _ in _SCORES.values())]
  return comparisons.markdown(header, rows)


def combined(results: committed.Results) -> str:
  """Three changes of `reasons` at once, beside the deciding pair; differences to its LoRA."""
  main, changed = results.study.stage("final"), results.of("combined").study.stage("final")
  final = pd.concat([main[main["arm"].isin(PAIR)], changed], ignore_index=True)
  tables_of = {name: final.pivot(index="seed", columns="arm", values=name) for name in _COMBINED}
  rows = []
  for method in (PAIR[1], PAIR[0], *changed["arm"].unique()):
    first = final[final["arm"] == method].iloc[0]
    cells = [
      "the three changes" if method in set(changed["arm"]) else style.method(method).label,
      f"{first['trainable_params']:,.0f}",
      f"{first['learning_rate']:g}",
    ]
    for name, (_, digits) in _COMBINED.items():
      values = _unit(name) * tables_of[name]
      text = f"{values[method].mean():.{digits}f}"
      if method != PAIR[1]:
        ends = statistics.paired_interval(values[method], values[PAIR[1]])
        mean, low, high = (f"{end:+.{digits}f}" for end in ends)
        text += f" ({mean} [{low}, {high}])".replace("-", "−")
      cells.append(text)
    rows.append(cells)
  header = ["method", "trainable", "rate", *(heading for heading, _ in _COMBINED.values())]
  return comparisons.markdown(header, rows)


def swap(results: committed.Results) -> str:
  """The swap test of one run: validation nats with its weights as trained and replaced."""
  row = routing_gain.swap(results)
  cells = [
    style.method(row["arm"]).label,
    f"{row['seed']:.0f}",
    f"{row['steps']:.0f}",
    *(f"{row[name]:.4f}" for name in ("nats", "nats_uniform", "nats_permuted")),
    f"{row['support_start']:.2f}",
    f"{row['support_end']:.2f}",
  ]
  header = (
    "method | seed | steps | nats as trained | equal weights | atoms permuted |"
    " effective support at the start | at the end"
  )
  return comparisons.markdown(header, [cells])


def _accuracies(of: measure.Measure) -> list[measure.Quantity]:
  return [score for score in (of, *of.also) if score.key.endswith("accuracy")]


def _with_interval(row: pd.Series, key: str, formatted) -> str:
  return tables.with_interval(row[key], row[f"{key}_low"], row[f"{key}_high"], formatted)


def _contrast(row: pd.Series, of: measure.Measure) -> str:
  if row["verdict"] == "baseline":
    return "baseline"
  text = _with_interval(row, of.contrast, tables.contrast(of))
  note = {"too few seeds": " (one seed: no interval)", "diverged": " (a run diverged)"}
  return (f"**{text}**" if row["verdict"] == "better" else text) + note.get(row["verdict"], "")
