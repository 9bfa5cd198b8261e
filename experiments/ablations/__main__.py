"""The ablations of the routing on regression: table and figure from their results.

python -m experiments.ablations                          # from the committed results
python -m experiments.ablations --from=runs/ablations    # keeps the results of a sweep first
"""

import pandas as pd

from experiments import command, kept
from experiments.ablations import analysis, figure

RESULTS = kept.RESULTS / "ablations"


def summary(levels: pd.DataFrame) -> str:
  """Markdown: a table a task, levels in the order of training, with 95 % intervals."""
  lines = []
  for task, own in levels.groupby("task", sort=False):
    lines += [
      f"`{task}`, noise 0.5:",
      "",
      "| factor | level | rank | atoms | parameters | rate | atoms in use | test MSE |"
      " to the reference | p (Holm) | reference |",
      "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in own.itertuples():
      edge = " (edge)" if row.rate_at_edge else ""
      contrast = ("", "", "")
      if pd.notna(row.percent):
        ends = f"{row.percent:+.1f} % [{row.percent_low:+.1f}, {row.percent_high:+.1f}]"
        contrast = (ends, f"{row.p_holm:.3f}", row.reference)
      lines.append(
        f"| {row.factor} | {row.level} | {row.rank} | {row.atoms} | {row.trainable_params:,}"
        f"{'' if row.matched else ' (not matched)'} | {row.learning_rate:g}{edge} |"
        f" {row.effective_support:.1f} | {row.mse:.3f} [{row.mse_low:.3f}, {row.mse_high:.3f}] |"
        f" {' | '.join(contrast)} |"
      )
    lines.append("")
  return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
  given = command.of_sweep("ablations", __doc__, RESULTS).parse_args(arguments)
  if given.parts:
    kept.keep(given.parts, given.results)
  levels = analysis.levels(kept.read(given.results))
  levels.to_csv(given.results / "levels.csv", index=False, float_format="%.6g")
  text = summary(levels)
  (given.results / "summary.md").write_text(text)
  if levels["percent"].notna().any():
    figure.draw(levels, given.results / "ablations")
  print(text)
  print(f"results: {given.results}")


if __name__ == "__main__":
  command.run(main)
