"""Queryable LoRA against LoRA on six frozen networks per task: tables and figure.

python -m experiments.bases                    # from the committed results
python -m experiments.bases --from=runs/bases  # keeps the results of a sweep first
"""

import pandas as pd

from experiments import command, kept
from experiments.bases import analysis, figure
from experiments.report import tables

RESULTS = kept.RESULTS / "bases"


def summary(pooled: pd.DataFrame, differences: pd.DataFrame) -> str:
  """Markdown: the means over the networks, then every network, with 95 % intervals."""
  lines = [
    "| task | method | baseline | networks | mean difference | scatter over networks, % |"
    " expected of the seeds, % | p (Holm) | verdict |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  lines += [
    f"| {row.task} | {row.method} | {row.baseline} | {row.bases} | {_ends(row)} |"
    f" {row.scatter:.1f} | {row.by_seeds:.1f} | {tables.probability(row.p_holm)} | {row.verdict} |"
    for row in pooled.itertuples()
  ]
  lines += [
    "",
    "| task | network | baseline's error | error | difference | rate | baseline's rate |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  lines += [
    f"| {row.task} | {row.base} | {row.baseline_error:.4f} | {row.error:.4f} | {_ends(row)} |"
    f" {row.learning_rate:g} | {row.baseline_learning_rate:g} |"
    for row in differences.itertuples()
  ]
  return "\n".join(lines) + "\n"


def _ends(row) -> str:
  return f"{row.percent:+.1f} % [{row.percent_low:+.1f}, {row.percent_high:+.1f}]"


def main(arguments: list[str] | None = None) -> None:
  given = command.of_sweep("bases", __doc__, RESULTS).parse_args(arguments)
  if given.parts:
    kept.keep(given.parts, given.results)
  again = kept.read(kept.RESULTS / "stability")
  rows = analysis.with_main_network(kept.read(given.results), again)
  differences = analysis.differences(rows)
  pooled = analysis.pooled(differences)
  differences.to_csv(given.results / "differences.csv", index=False, float_format="%.6g")
  pooled.to_csv(given.results / "pooled.csv", index=False, float_format="%.6g")
  text = summary(pooled, differences)
  (given.results / "summary.md").write_text(text)
  figure.draw(differences, pooled, given.results / "bases")
  print(text)
  print(f"results: {given.results}")


if __name__ == "__main__":
  command.run(main)
