"""Where does the instruction enter best, and how are the atoms weighed?

The factorial of instruction, weights and truth on six targets that only the instruction separates:
`docs/studies/factorial.md`. `factorial_language.py` is the same on a language model.

  python launch.py --config=configs/factorial.py --workdir=runs/factorial --sweep
  python -m experiments factorial --from=runs/factorial
"""

import functools
from collections.abc import Sequence

import pandas as pd
from matplotlib import figure

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.analysis import factorial, factorial_figure

REGRESSION = factorial.DOMAINS["regression"]
_PRIOR = "prior/on/true"
# Effect, the claim that it decides, and of a claim about routing the arm whose gain it needs.
_CLAIMS = (
  ("prior − none", "the instruction as a prior lowers the error", None),
  ("query − none", "the instruction in the query lowers the error", None),
  ("on − static", "routing by the input lowers the error against a static mixture", _PRIOR),
  ("on − uniform", "softmax weights lower the error against equal weights on the top 4", _PRIOR),
  (
    "(prior − none) × (on − static)",
    "the prior gains by routing (interaction with static)",
    _PRIOR,
  ),
  (
    "(prior − none) × (on − uniform)",
    "the prior gains by routing (interaction with uniform)",
    _PRIOR,
  ),
)


def summarise(results: committed.Results, domain: factorial.Domain) -> str:
  """Writes cells.csv, effects.csv and summary.md: all cells, then all effects."""
  cells, effects = (make(results.rows, domain) for make in (factorial.cells, factorial.effects))
  results.write("cells.csv", cells)
  results.write("effects.csv", effects)
  header = ["instruction", "routing", "truth", "atoms", "rate", domain.unit]
  header += ["to the same routing without it", "to LoRA with it in the input"]
  cell_rows = [
    [
      row["instruction"],
      row["routing"],
      row["truth"],
      f"{row['atoms']:g}",
      f"{row['learning_rate']:g}{' (edge)' if row['rate_at_edge'] else ''}",
      comparisons.interval(row, "error", ".3f", ""),
      *(
        comparisons.interval(row, name) if pd.notna(row.get(name)) else ""
        for name in ("against_untold", "against_lora_input")
      ),
    ]
    for row in cells.to_dict("records")
  ]
  if domain.accuracy:
    header.append("exact match, %")
    for cells_of_row, accuracy in zip(cell_rows, cells["exact_match"], strict=True):
      cells_of_row.append(f"{accuracy:.1f}" if pd.notna(accuracy) else "")
  effect_rows = [
    f"{row['family']} | {row['truth']} | {row['effect']} |"
    f" {comparisons.interval(row, unit='')} | {comparisons.interval(row, 'error', '+.3f', '')} |"
    f" {row['p_holm']:.3f}"
    for row in effects.to_dict("records")
  ]
  text = comparisons.markdown(header, cell_rows) + "\n"
  header = ["family", "wordings", "effect", "per cent", domain.unit, "p (Holm)"]
  return results.write_text("summary.md", text + comparisons.markdown(header, effect_rows))


def table(results: committed.Results, domain: factorial.Domain) -> str:
  """Main effects and interactions at wordings that training has not seen."""
  rows = results.table("effects.csv")
  rows = rows[(rows["truth"] == "unseen") & rows["family"].isin(factorial_figure.FAMILIES)]
  return comparisons.markdown(
    ["family", "effect", f"change of {domain.unit.partition(' (')[0]}", "p (Holm)"],
    [
      [
        row["family"],
        row["effect"].replace("|", "\\|"),
        comparisons.signed_interval(row),
        f"{row['p_holm']:.3f}",
      ]
      for row in rows.to_dict("records")
    ],
  )


def claims(
  results: committed.Results,
  domain: factorial.Domain,
  effects: Sequence[tuple[str, str, str | None]],
) -> list[study_lib.Claim]:
  """Claims on single effects at wordings that training has not seen.

  Rule: `verdict` of the effect's interval and corrected p-value.

  Args:
    effects: effect, claim, and of a claim about routing the arm whose gain it needs.
  """
  rows = results.table("effects.csv")
  rows = rows[rows["truth"] == "unseen"].set_index("effect")
  return [
    study_lib.Claim(
      claim,
      verdict(rows.loc[name]),
      f"{comparisons.signed_interval(rows.loc[name])}, p {rows.loc[name, 'p_holm']:.3f}",
      arm and f"{domain.name} {arm}",
    )
    for name, claim, arm in effects
    if name in rows.index
  ]


def verdict(row, alpha: float = 0.05) -> str:
  """The verdict on a claim that an error falls, from an interval and a corrected p-value."""
  if row["percent_low"] <= 0 <= row["percent_high"] or row["p_holm"] >= alpha:
    return "inconclusive"
  return "supported" if row["percent_high"] < 0 else "not supported"


def draw(results: committed.Results, domain: factorial.Domain) -> figure.Figure:
  """Errors of the cells, and effects."""
  cells, effects = results.table("cells.csv"), results.table("effects.csv")
  return factorial_figure.draw(cells, effects, domain)


def of_domain(domain: factorial.Domain, effects: Sequence[tuple[str, str, str | None]]) -> dict:
  """The fields of a study record that every factorial has."""
  return {
    "config": f"configs/{domain.name}.py",
    "results": domain.name,
    "name": domain.name,
    "claims": functools.partial(claims, domain=domain, effects=effects),
    "tables": {domain.name: functools.partial(table, domain=domain)},
    "draw": functools.partial(draw, domain=domain),
    "summarise": functools.partial(summarise, domain=domain),
  }


STUDY = study_lib.Study(
  **of_domain(REGRESSION, _CLAIMS),
  question="Where does the instruction enter best, and how are the atoms weighed?",
  about="On six targets that only the instruction separates, every way to give the instruction"
  " is crossed with every way to weigh the atoms, and with wordings that are true, new or"
  " shuffled. Main effects and interactions are paired contrasts over ten seeds. The cells"
  " are arms trained separately, so that they do not measure what the routing of a trained"
  " network gains.",
  caption="Left: test error (units of the source's variance, ten seeds, 95 % bootstrap intervals)"
  " by where the instruction enters and how atoms are weighed, on six targets that only the"
  " instruction tells apart. Right: main effects and interactions at wordings that training has"
  " not seen, in per cent of the error; black where Holm's p is below .05.",
  position=70,
)
