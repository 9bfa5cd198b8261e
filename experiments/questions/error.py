"""Does Queryable LoRA predict better than LoRA on noisy regression? The paper's first claim."""

import pathlib

import pandas as pd
from matplotlib import figure
from matplotlib import patches as mpatches

from experiments.questions import committed, question
from experiments.report import headline, inputs, style, tables
from qlora_jax.studies import statistics

_LOWER, _TIE, _HIGHER = "#0072b2", style.FAINT, "#d55e00"
_LOOKS = (
  (_LOWER, "", "lower error (Holm)"),
  (_TIE, "", "not significant"),
  (_HIGHER, "////", "higher error (Holm)"),
)
_ENDS = ["relative", "relative_low", "relative_high"]


def compared() -> pd.DataFrame:
  """The study's subject beside its closest baseline: a row per setting; see `docs/report.md`."""
  return headline.compared(committed.summary("regression")).groupby(inputs.SETTING).tail(1)


def against_lora() -> pd.DataFrame:
  """Every trained method beside LoRA: a row a setting and method."""
  rows = committed.summary("regression")
  rows = rows[(rows["baseline"] == "lora") & ~rows["method"].isin(["lora", "none"])]
  return rows[rows[_ENDS].notna().all(axis=1)]


def holm_counts(rows: pd.DataFrame) -> statistics.Counts:
  """Wins, ties and losses: a setting counts where Holm's p over its methods is below .05, too."""
  clear = rows["p_holm"] < statistics.SIGNIFICANCE
  wins = int((clear & (rows["relative_high"] < 0)).sum())
  losses = int((clear & (rows["relative_low"] > 0)).sum())
  return statistics.Counts(wins, len(rows) - wins - losses, losses)


def corrected() -> tuple[int, int, int]:
  """Comparisons of all methods with LoRA; those whose interval leaves out zero; after Holm."""
  rows = against_lora()
  alone = ((rows["relative_low"] > 0) | (rows["relative_high"] < 0)).sum()
  number = holm_counts(rows)
  return len(rows), int(alone), number.wins + number.losses


def counts() -> str:
  """Wins, ties and losses of each method against LoRA over the settings that it ran in (Holm)."""
  rows, table = against_lora(), []
  for key in style.ordered(rows["method"]):
    own = rows[rows["method"] == key]
    number = holm_counts(own)
    table.append(
      [
        style.method(key).label,
        str(len(own)),
        *map(str, number),
        tables.percent(own["relative"].median()) + " %",
      ]
    )
  header = [
    "method",
    "settings",
    "lower error (Holm)",
    "not significant",
    "higher error (Holm)",
    "median",
  ]
  return committed.markdown(header, table)


def resolved() -> str:
  """Effect sizes, corrected p-values, and the seeds that would resolve a difference of 5 %."""
  table = [
    [
      row["setting"],
      row["label"],
      style.method(row["baseline"]).label,
      tables.signed(row["effect_size"], 2),
      tables.number(row["p_holm"], 2),
      f"{row['num_pairs']:.0f}",
      f"{row['seeds_needed']:.0f}",
    ]
    for row in compared().to_dict("records")
  ]
  header = [
    "setting",
    "method",
    "against",
    "effect size",
    "p (Holm)",
    "seeds",
    "seeds that resolve 5 %",
  ]
  return committed.markdown(header, table)


def answer() -> list[question.Claim]:
  """The claim on test performance, judged by the settings' intervals."""
  rows = compared()
  number, clear = holm_counts(rows), rows["p_holm"] < statistics.SIGNIFICANCE
  names = {
    verdict: "; ".join(rows[clear & (rows["verdict"] == verdict)]["setting"]) or "none"
    for verdict in ("better", "worse")
  }
  if number.losses == 0 and number.wins > len(rows) / 2:
    verdict = "supported"
  else:
    verdict = "task-dependent" if number.wins else "not supported"
  evidence = (
    f"lower on {number.wins} of {len(rows)} settings ({names['better']}), higher on"
    f" {number.losses} ({names['worse']}), not significant on {number.ties};"
    " Holm over the methods of a setting"
  )
  claim = "lower test error than LoRA on noisy non-linear regression (the paper's)"
  return [question.Claim(claim, verdict, evidence)]


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  with style.context():
    made = figure.Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = made.subplots(1, 2, width_ratios=(1, 1.1))
    _forest(left, compared().sort_values("relative", ascending=False))
    _bars(right, against_lora())
    made.legend(
      handles=[
        mpatches.Patch(facecolor=color, hatch=hatch, edgecolor=style.PAPER, label=label)
        for color, hatch, label in _LOOKS
      ],
      loc="outside lower right",
      ncols=3,
    )
    made.savefig(target.with_suffix(".png"), dpi=200)
    made.savefig(target.with_suffix(".svg"))


def _forest(axis, rows: pd.DataFrame) -> None:
  names = []
  for place, row in enumerate(rows.to_dict("records")):
    look = style.method(row["method"])
    clear = row["verdict"] in ("better", "worse")
    axis.plot([row["relative_low"], row["relative_high"]], [place, place], color=look.color)
    axis.plot(
      row["relative"],
      place,
      look.marker,
      color=look.color,
      markersize=6,
      markerfacecolor=look.color if clear else style.PAPER,
    )
    given = row["method"] != "queryable"
    names.append(row["setting"] + ("\n(with the instruction)" if given else ""))
  axis.axvline(0, color=style.INK, linewidth=0.8)
  axis.set_yticks(range(len(names)), names)
  axis.set_xlabel("difference in test MSE, % (10 seeds, 95 % interval)")
  axis.set_title("Queryable against LoRA, by setting")
  axis.grid(axis="x")


def _bars(axis, rows: pd.DataFrame) -> None:
  methods = style.ordered(rows["method"])
  for place, key in enumerate(methods):
    own = rows[rows["method"] == key]
    start = 0
    for number, (color, hatch, _) in zip(holm_counts(own), _LOOKS, strict=True):
      if number:
        axis.barh(place, number, left=start, color=color, hatch=hatch, edgecolor=style.PAPER)
        ink = style.INK if color == _TIE else style.PAPER
        axis.text(
          start + number / 2,
          place,
          str(number),
          ha="center",
          va="center_baseline",
          fontsize=7,
          color=ink,
          bbox=dict(facecolor=color, edgecolor="none", pad=0.8) if hatch else None,
        )
      start += number
  axis.set_yticks(range(len(methods)), [style.method(key).label for key in methods])
  axis.set_ylim(len(methods) - 0.4, -0.6)
  axis.set_xlabel("settings")
  axis.set_title("Each method's error against LoRA's")


QUESTION = question.Question(
  name="regression_error",
  caption="Left: mean paired difference in test error of Queryable LoRA to LoRA in each setting, in"
  " percent, with 95 % bootstrap intervals over ten seeds; a filled mark's interval leaves out"
  " zero. On multi target both methods see the instruction. Right: in how many settings each"
  " method's error is significantly lower, not significantly different, or higher (Holm's p over"
  " the methods of a setting).",
  study="regression",
  command="python launch.py --config=configs/regression.py --workdir=runs/regression --sweep",
  draw=draw,
  tables={"counts": counts, "resolved": resolved},
  answer=answer,
)
