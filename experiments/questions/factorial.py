"""Where does the instruction enter best, and how are the atoms weighed?"""

import pathlib

from experiments.factorial import analysis, figure
from experiments.questions import committed, question

REGRESSION = analysis.DOMAINS["regression"]
_PRIOR = "prior/on/true"
# Effect, the claim that it decides, and of a claim about routing the arm whose gain it needs.
_TOLD = (
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


def ends(row, name: str = "percent", digits: int = 1) -> str:
  """`mean [low, high]` in per cent."""
  texts = (f"{row[f'{name}{end}']:+.{digits}f}".replace("-", "−") for end in ("", "_low", "_high"))
  mean, low, high = texts
  return f"{mean} % [{low}, {high}]"


def table(domain: analysis.Domain = REGRESSION) -> str:
  """Main effects and interactions at wordings that training has not seen."""
  rows = committed.csv(domain.name, "effects")
  rows = rows[(rows["truth"] == "unseen") & rows["family"].isin(figure.FAMILIES)]
  return committed.markdown(
    ["family", "effect", f"change of {domain.unit.partition(' (')[0]}", "p (Holm)"],
    [
      [row["family"], row["effect"].replace("|", "\\|"), ends(row), f"{row['p_holm']:.3f}"]
      for row in rows.to_dict("records")
    ],
  )


def answer(domain: analysis.Domain = REGRESSION, told=_TOLD) -> list[question.Claim]:
  """The prior, the routing, and whether the prior gains by routing."""
  rows = committed.csv(domain.name, "effects")
  rows = rows[rows["truth"] == "unseen"].set_index("effect")
  return [
    question.Claim(
      claim,
      verdict(rows.loc[name]),
      f"{ends(rows.loc[name])}, p {rows.loc[name, 'p_holm']:.3f}",
      arm and f"{domain.name} {arm}",
    )
    for name, claim, arm in told
    if name in rows.index
  ]


def verdict(row, alpha: float = 0.05) -> str:
  """What an interval and a corrected p-value say of a claim that an error falls."""
  if row["percent_low"] <= 0 <= row["percent_high"] or row["p_holm"] >= alpha:
    return "inconclusive"
  return "supported" if row["percent_high"] < 0 else "not supported"


def draw(target: pathlib.Path, domain: analysis.Domain = REGRESSION) -> None:
  """Writes `target`.svg and .png."""
  cells, effects = (committed.csv(domain.name, name) for name in ("cells", "effects"))
  figure.draw(cells, effects, target, domain)


QUESTION = question.Question(
  name="factorial",
  caption="Left: test error (units of the source's variance, ten seeds, 95 % bootstrap intervals)"
  " by where the instruction enters and how atoms are weighed, on six targets that only the"
  " instruction tells apart. Right: main effects and interactions at wordings that training has"
  " not seen, in per cent of the error; black where Holm's p is below .05.",
  study="factorial",
  command="python launch.py --config=configs/factorial.py --workdir=runs/factorial --sweep",
  draw=draw,
  tables={"factorial": table},
  answer=answer,
)
