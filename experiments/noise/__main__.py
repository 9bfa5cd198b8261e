"""Queryable LoRA against LoRA by noise and number of training rows: table and figure.

python -m experiments.noise                      # from the committed results
python -m experiments.noise --from=runs/noise    # keeps the results of a sweep first
"""

import pandas as pd

from experiments import command, kept
from experiments.noise import analysis, figure

RESULTS = kept.RESULTS / "noise"


def summary(pooled: pd.DataFrame, differences: pd.DataFrame) -> str:
  """Markdown: the means over the kinds of noise, then every setting, with 95 % intervals."""
  lines = [
    "| task | level | training rows | mean difference over five kinds | effect size | p (Holm) |"
    " verdict |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in pooled.itertuples():
    ends = f"{row.percent:+.1f} % [{row.percent_low:+.1f}, {row.percent_high:+.1f}]"
    lines.append(
      f"| {row.task} | {row.noise_level:g} | {row.train_rows:,} | {ends} | {row.effect_size:+.1f} |"
      f" {row.p_holm:.3f} | {row.verdict} |"
    )
  lines += [
    "",
    "| task | noise | level | training rows | LoRA's test MSE | Queryable LoRA's | difference |"
    " p (Holm) | verdict |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in differences.itertuples():
    ends = f"{row.percent:+.1f} % [{row.percent_low:+.1f}, {row.percent_high:+.1f}]"
    lines.append(
      f"| {row.task} | {row.noise_kind.replace('_', ' ')} | {row.noise_level:g} |"
      f" {row.train_rows:,} | {row.lora_error:.4f} | {row.error:.4f} | {ends} | {row.p_holm:.3f} |"
      f" {row.verdict}{' (rate at an edge)' if row.rate_at_edge else ''} |"
    )
  return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
  given = command.of_sweep("noise", __doc__, RESULTS).parse_args(arguments)
  if given.parts:
    kept.keep(given.parts, given.results)
  rows = kept.read(given.results)
  differences, pooled = analysis.differences(rows), analysis.pooled(rows)
  differences.to_csv(given.results / "differences.csv", index=False, float_format="%.6g")
  pooled.to_csv(given.results / "pooled.csv", index=False, float_format="%.6g")
  text = summary(pooled, differences)
  (given.results / "summary.md").write_text(text)
  figure.draw(differences, given.results / "noise")
  print(text)
  print(f"results: {given.results}")


if __name__ == "__main__":
  command.run(main)
