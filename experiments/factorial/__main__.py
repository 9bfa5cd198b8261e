"""The factorial of instruction, routing and truth: tables and figure from its results.

python -m experiments.factorial                          # from the committed results
python -m experiments.factorial --from=runs/factorial    # keeps the results of a sweep first
python -m experiments.factorial --domain=language        # the one on a language model
"""

import pandas as pd

from experiments import command, kept
from experiments.factorial import analysis, figure

RESULTS = kept.RESULTS / analysis.DOMAINS["regression"].name


def summary(cells: pd.DataFrame, effects: pd.DataFrame, domain: analysis.Domain) -> str:
  """Markdown: all cells, and all effects at unseen wordings, with 95 % intervals."""
  exact = bool(domain.accuracy)
  heads = [
    "instruction",
    "routing",
    "truth",
    "atoms",
    "rate",
    domain.unit,
    "to the same routing, told nothing",
    "to LoRA with it in the input",
    *(["exact match, %"] if exact else []),
  ]
  lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
  for row in cells.to_dict("records"):
    edge = " (edge)" if row["rate_at_edge"] else ""
    lines.append(
      f"| {row['instruction']} | {row['routing']} | {row['truth']} | {row['atoms']:g} |"
      f" {row['learning_rate']:g}{edge} | {_ends(row, 'error', '.3f')} |"
      f" {_ends(row, 'against_untold', '+.1f', ' %')} |"
      f" {_ends(row, 'against_lora_input', '+.1f', ' %')} |"
      + (f" {_number(row['exact_match'], '.1f')} |" if exact else "")
    )
  lines += [
    "",
    f"| family | wordings | effect | per cent | {domain.unit} | p (Holm) |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for row in effects.to_dict("records"):
    lines.append(
      f"| {row['family']} | {row['truth']} | {row['effect']} | {_ends(row, 'percent', '+.1f')} |"
      f" {_ends(row, 'error', '+.3f')} | {row['p_holm']:.3f} |"
    )
  return "\n".join(lines) + "\n"


def _number(value: float, form: str) -> str:
  return f"{value:{form}}" if pd.notna(value) else ""


def _ends(row: dict, name: str, form: str, unit: str = "") -> str:
  if not pd.notna(row.get(name)):
    return ""
  low, high = row[f"{name}_low"], row[f"{name}_high"]
  return f"{row[name]:{form}}{unit} [{low:{form}}, {high:{form}}]"


def main(arguments: list[str] | None = None) -> None:
  parser = command.of_sweep("factorial", __doc__, None)
  parser.add_argument("--domain", choices=tuple(analysis.DOMAINS), default="regression")
  given = parser.parse_args(arguments)
  domain = analysis.DOMAINS[given.domain]
  results = given.results or kept.RESULTS / domain.name
  if given.parts:
    kept.keep(given.parts, results)
  rows = kept.read(results)
  cells, effects = analysis.cells(rows, domain), analysis.effects(rows, domain)
  cells.to_csv(results / "cells.csv", index=False, float_format="%.6g")
  effects.to_csv(results / "effects.csv", index=False, float_format="%.6g")
  text = summary(cells, effects, domain)
  (results / "summary.md").write_text(text)
  figure.draw(cells, effects, results / "factorial", domain)
  print(text)
  print(f"results: {results}")


if __name__ == "__main__":
  command.run(main)
