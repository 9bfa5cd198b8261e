"""`python -m experiments.documents`: writes the measured tables into the documentation.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; its numbers come from
`experiments/results/` alone, so a test can remake them and compare.
"""

import argparse
import re
import sys

import pandas as pd

from experiments.questions import committed, every
from experiments.report import inputs, measure, style, tables
from experiments.scaling import __main__ as scaling
from experiments.scaling import compiled as scaling_compiled
from experiments.scaling import tables as scaling_tables

ROOT, RESULTS = committed.ROOT, committed.RESULTS
PAGES = (
  "README.md",
  "docs/results.md",
  "docs/language_results.md",
  "experiments/scaling/README.md",
)
LANGUAGE = RESULTS / "induction"  # the study of a language model
REASONS = RESULTS / "reasons"  # changes to its deciding Queryable LoRA, one at a time
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def regression() -> pd.DataFrame:
  """The summary of the committed regression study; `docs/report.md` has its columns."""
  return committed.summary("regression")


def language() -> pd.DataFrame:
  """The summary of the committed study of a language model."""
  return committed.summary("induction")


def _rows(setting: str, methods: list[str], baseline: str) -> pd.DataFrame:
  summary = regression()
  rows = summary[(summary["setting"] == setting) & (summary["baseline"] == baseline)]
  return rows.set_index("method", drop=False).loc[methods]


def _difference(row: pd.Series) -> str:
  if row["verdict"] == "baseline":
    return "baseline"
  text = tables.with_interval(
    row["relative"], row["relative_low"], row["relative_high"], tables.percent
  ).replace(" [", " % [")
  return f"**{text}**" if row["verdict"] == "better" else text


def deciding() -> str:
  """The two tasks that separate the routing and the prior from what LoRA can express."""
  chosen = {
    ("regimes, noise 0.5", "lora"): [
      "lora",
      "queryable",
      "queryable_no_summary",
      "static",
      "uniform",
      "lily",
      "comol",
      "full",
    ],
    ("multi target", "lora_input"): [
      "lora_input",
      "queryable_prior",
      "queryable_query",
      "queryable_prior_query",
      "queryable",
      "full_input",
    ],
  }
  rows = []
  for (setting, baseline), methods in chosen.items():
    known = set(regression()["method"])
    for _, row in _rows(setting, [m for m in methods if m in known], baseline).iterrows():
      rows.append(
        [
          setting,
          row["label"],
          f"{row['trainable_params']:,.0f}",
          tables.with_interval(row["test_mse"], row["test_mse_low"], row["test_mse_high"]),
          _difference(row),
        ]
      )
  return committed.markdown(["task", "method", "trainable", "test MSE", "difference"], rows)


def every_task() -> str:
  """Queryable LoRA beside LoRA in every setting, whatever came out."""
  summary, rows = regression(), []
  for setting in summary["setting"].unique():
    for ours, theirs in (("queryable", "lora"), ("queryable_prior", "lora_input")):
      part = summary[(summary["setting"] == setting) & (summary["method"] == ours)]
      both = summary[(summary["setting"] == setting) & (summary["method"] == theirs)]
      base = part[part["baseline"] == theirs]
      if both.empty or base.empty or (setting == "multi target" and theirs == "lora"):
        continue
      row, other = base.iloc[0], both.iloc[0]
      rows.append(
        [
          setting,
          row["label"],
          style.method(theirs).label,
          tables.number(row["test_mse"]),
          tables.number(other["test_mse"]),
          _difference(row),
          row["verdict"],
          f"{tables.number(row['spread'])} / {tables.number(other['spread'])}",
          f"{tables.number(row['basin_decades'], 2)} / {tables.number(other['basin_decades'], 2)}",
        ]
      )
  header = [
    "setting",
    "method",
    "against",
    "test MSE",
    "its test MSE",
    "difference",
    "verdict",
    "spread over seeds",
    "basin, decades",
  ]
  return committed.markdown(header, rows)


def language_deciding() -> str:
  """Every way to use the instruction, beside the base and against LoRA with it in the prompt."""
  summary = language()
  of = measure.of(summary)
  own = summary.drop_duplicates([*inputs.SETTING, "method"], keep="last")  # the closest baseline
  rows = []
  for prompted in (False, True):
    bases = own[own["method"].str.contains("+prompt", regex=False) == prompted]
    if of.base and len(bases):
      name = style.method("none+prompt" if prompted else "none").label
      values = [tables.value(each)(bases[each.base].iloc[0]) for each in _accuracies(of)]
      rows.append([name, "0", "", tables.MISSING, *values, ""])
  for _, row in own.iterrows():
    rows.append(
      [
        row["label"],
        f"{row['trainable_params']:,.0f}",
        str(row["num_seeds"]),
        _with_interval(row, "validation_nats", tables.number),
        *(_with_interval(row, each.key, tables.value(each)) for each in _accuracies(of)),
        _contrast(row, of),
      ]
    )
  header = [
    "method",
    "trainable",
    "seeds",
    "validation nats",
    "exact match, new wordings, %",
    "known wordings, %",
    "difference to LoRA + prompt, points",
  ]
  return committed.markdown(header, rows)


def language_tasks() -> str:
  """Exact match in new wordings, task by task."""
  scores = tables.by_task(inputs.read(LANGUAGE))
  cells = scores[scores["split"] == "test"].pivot(index="method", columns="name", values="accuracy")
  rows = [
    [style.method(key).label, *(f"{value:.1f}" for value in cells.loc[key])]
    for key in style.ordered(cells.index)
  ]
  return committed.markdown(["method", *(name.replace("_", " ") for name in cells.columns)], rows)


def language_rates() -> str:
  """The search: validation nats of each method at each learning rate, the chosen one in bold."""
  study = inputs.read(LANGUAGE)
  search, chosen = study.stage("search"), language().drop_duplicates("method").set_index("method")
  means = search.groupby(["method", "learning_rate"])["validation_nats"].mean().unstack()
  rows = []
  for key in style.ordered(means.index):
    rate = chosen["learning_rate"].get(key)
    texts = [(each, tables.number(value)) for each, value in means.loc[key].items()]
    rows.append(
      [style.method(key).label, *(f"**{text}**" if each == rate else text for each, text in texts)]
    )
  return committed.markdown(["method", *(tables.plain(rate) for rate in means.columns)], rows)


def language_reasons() -> str:
  """One change at a time to the deciding Queryable LoRA: likelihood beside LoRA's, one seed."""
  rows = inputs.read(REASONS).stage("final").set_index("method", drop=False)
  baseline = rows.loc["lora+prompt", "validation_nats"]
  table = []
  for key, row in rows.sort_values("validation_nats").iterrows():
    own = row["validation_nats"] - baseline
    support = row["router/effective_support"]
    table.append(
      [
        style.method(key.removesuffix("+prompt")).label,
        f"{row['trainable_params']:,.0f}",
        f"{row['rank']:.0f}",
        f"{row['validation_nats']:.3f}",
        "baseline" if key == "lora+prompt" else f"{own:+.3f}".replace("-", "−"),
        tables.MISSING if pd.isna(support) else f"{support:.1f}",
      ]
    )
  header = [
    "Queryable + prior, but",
    "trainable",
    "rank",
    "validation nats",
    "minus LoRA's",
    "atoms in use",
  ]
  return committed.markdown(header, table)


def _compiled() -> pd.DataFrame:
  return scaling.against_lora(scaling_compiled.read(RESULTS / "scaling"))


def _accuracies(of: measure.Measure) -> list[measure.Quantity]:
  return [each for each in (of, *of.also) if each.key.endswith("accuracy")]


def _with_interval(row: pd.Series, key: str, formatted) -> str:
  return tables.with_interval(row[key], row[f"{key}_low"], row[f"{key}_high"], formatted)


def _contrast(row: pd.Series, of: measure.Measure) -> str:
  if row["verdict"] == "baseline":
    return "baseline"
  text = _with_interval(row, of.contrast, tables.contrast(of))
  note = {"too few seeds": " (one seed: no interval)", "diverged": " (a run diverged)"}
  return (f"**{text}**" if row["verdict"] == "better" else text) + note.get(row["verdict"], "")


def claims() -> str:
  """Every question's claims, each with its verdict and evidence."""
  rows = []
  for each in every.QUESTIONS.values():
    if each.ready:
      rows += [[each.short, *claim.cells()] for claim in each.answer()]
  return committed.markdown(["", "claim", "verdict", "evidence"], rows)


TABLES = {
  "claims": claims,
  "deciding": deciding,
  "every_task": every_task,
  "language_deciding": language_deciding,
  "language_tasks": language_tasks,
  "language_rates": language_rates,
  "language_reasons": language_reasons,
  "scaling_targets": lambda: scaling_tables.targets(_compiled()),
  "scaling_compiled": lambda: scaling_tables.compiled(_compiled()),
  "scaling_overhead": scaling_tables.overhead,
  "scaling_plans": scaling_tables.plans,
}
for _question in every.QUESTIONS.values():
  TABLES |= {name: table for name, table in _question.tables.items() if name not in TABLES}


def filled(text: str) -> str:
  """`text` with every marked table remade; a name without a table raises KeyError."""
  return _MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def main(argv: list[str] | None = None) -> int:
  """Writes the pages, or with --check names the ones that differ and returns 1."""
  parser = argparse.ArgumentParser(prog="python -m experiments.documents", description=__doc__)
  parser.add_argument("--check", action="store_true", help="write nothing; fail where they differ")
  check = parser.parse_args(argv).check
  differing = []
  for page in PAGES:
    path = ROOT / page
    text = path.read_text()
    if filled(text) != text:
      differing.append(page)
      if not check:
        path.write_text(filled(text))
  if check and differing:
    print(f"tables out of date in {', '.join(differing)}: run python -m experiments.documents")
  return int(check and bool(differing))


if __name__ == "__main__":
  sys.exit(main())
