"""The factorial of instruction, routing and truth: tables and figure from its results.

python -m experiments.factorial                          # from the committed results
python -m experiments.factorial --from=runs/factorial    # keeps the results of a sweep first
"""

import argparse
import pathlib
import sys

import pandas as pd

from experiments import kept
from experiments.factorial import analysis, figure
from qlora_jax import errors

RESULTS = kept.RESULTS / "factorial"


def summary(cells: pd.DataFrame, effects: pd.DataFrame) -> str:
  """Markdown: all cells, and all effects at unseen wordings, with 95 % intervals."""
  lines = [
    "| instruction | routing | truth | atoms | rate | test MSE | to the same routing, told nothing"
    " | to LoRA with it in the input |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for row in cells.to_dict("records"):
    edge = " (edge)" if row["rate_at_edge"] else ""
    lines.append(
      f"| {row['instruction']} | {row['routing']} | {row['truth']} | {row['atoms']:g} |"
      f" {row['learning_rate']:g}{edge} | {_ends(row, 'mse', '.3f')} |"
      f" {_ends(row, 'against_untold', '+.1f', ' %')} |"
      f" {_ends(row, 'against_lora_input', '+.1f', ' %')} |"
    )
  lines += [
    "", "| family | wordings | effect | per cent | MSE | p (Holm) |",
    "| --- | --- | --- | --- | --- | --- |",
  ]  # fmt: skip
  for row in effects.to_dict("records"):
    lines.append(
      f"| {row['family']} | {row['truth']} | {row['effect']} | {_ends(row, 'percent', '+.1f')} |"
      f" {_ends(row, 'mse', '+.3f')} | {row['p_holm']:.3f} |"
    )
  return "\n".join(lines) + "\n"


def _ends(row: dict, name: str, form: str, unit: str = "") -> str:
  if not pd.notna(row.get(name)):
    return ""
  low, high = row[f"{name}_low"], row[f"{name}_high"]
  return f"{row[name]:{form}}{unit} [{low:{form}}, {high:{form}}]"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m experiments.factorial", description=__doc__)
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  parser.add_argument("--from", dest="workdir", type=pathlib.Path, help="a sweep to keep first")
  given = parser.parse_args(arguments)
  if given.workdir:
    kept.keep(given.workdir, given.results)
  rows = kept.read(given.results)
  cells, effects = analysis.cells(rows), analysis.effects(rows)
  cells.to_csv(given.results / "cells.csv", index=False, float_format="%.6g")
  effects.to_csv(given.results / "effects.csv", index=False, float_format="%.6g")
  text = summary(cells, effects)
  (given.results / "summary.md").write_text(text)
  figure.draw(cells, effects, given.results / "factorial")
  print(text)
  print(f"results: {given.results}")


if __name__ == "__main__":
  try:
    main()
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
