"""Does Queryable LoRA predict better than LoRA on noisy regression? The paper's first claim.

The main study: every method on ten tasks, one of them at four levels of noise.

  python launch.py --config=configs/regression.py --workdir=runs/regression --sweep
  python -m experiments regression_error --from=runs/regression
"""

import pandas as pd
from matplotlib import figure
from matplotlib import patches as mpatches

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.report import headline, inputs, style, tables
from qlora_jax.studies import statistics

_LOWER, _TIE, _HIGHER = "#0072b2", style.FAINT, "#d55e00"
_LOOKS = (
  (_LOWER, "", "lower error (Holm)"),
  (_TIE, "", "not significant"),
  (_HIGHER, "////", "higher error (Holm)"),
)
_ENDS = ["relative", "relative_low", "relative_high"]


def closest_baselines(results: committed.Results) -> pd.DataFrame:
  """Queryable LoRA beside its closest baseline: a row per setting; see `docs/report.md`."""
  return headline.compared(results.summary).groupby(inputs.SETTING).tail(1)


def against_lora(results: committed.Results) -> pd.DataFrame:
  """Every trained method beside LoRA: a row per setting and method."""
  rows = results.summary
  rows = rows[(rows["baseline"] == "lora") & ~rows["arm"].isin(["lora", "none"])]
  return rows[rows[_ENDS].notna().all(axis=1)]


def holm_counts(rows: pd.DataFrame) -> statistics.Counts:
  """Wins, ties and losses; a setting counts only where Holm's p over its methods is below .05."""
  clear = rows["p_holm"] < statistics.SIGNIFICANCE
  wins = int((clear & (rows["relative_high"] < 0)).sum())
  losses = int((clear & (rows["relative_low"] > 0)).sum())
  return statistics.Counts(wins, len(rows) - wins - losses, losses)


def corrected(results: committed.Results) -> tuple[int, int, int]:
  """Comparisons of all methods with LoRA; those whose interval excludes zero; after Holm."""
  rows = against_lora(results)
  alone = ((rows["relative_low"] > 0) | (rows["relative_high"] < 0)).sum()
  number = holm_counts(rows)
  return len(rows), int(alone), number.wins + number.losses


def counts(results: committed.Results) -> str:
  """Wins, ties and losses of each method against LoRA over the settings that it ran in (Holm)."""
  rows, table = against_lora(results), []
  for key in style.ordered(rows["arm"]):
    method_rows = rows[rows["arm"] == key]
    number = holm_counts(method_rows)
    table.append(
      [
        style.method(key).label,
        str(len(method_rows)),
        *map(str, number),
        tables.percent(method_rows["relative"].median()) + " %",
      ]
    )
  header = "method | settings | lower error (Holm) | not significant | higher error (Holm) | median"
  return comparisons.markdown(header, table)


def resolved(results: committed.Results) -> str:
  """Effect sizes, corrected p-values, and the seeds that would resolve a difference of 5 %."""
  table = [
    f"{row['setting']} | {row['label']} | {style.method(row['baseline']).label} |"
    f" {tables.signed(row['effect_size'], 2)} | {tables.number(row['p_holm'], 2)} |"
    f" {row['num_pairs']:.0f} | {row['seeds_needed']:.0f}"
    for row in closest_baselines(results).to_dict("records")
  ]
  header = "setting | method | against | effect size | p (Holm) | seeds | seeds that resolve 5 %"
  return comparisons.markdown(header, table)


def deciding(results: committed.Results) -> str:
  """The two tasks that separate the routing and the prior from what LoRA can express."""
  methods_of = {
    ("regimes, noise 0.5", "lora"): (
      "lora queryable queryable_no_summary static uniform lily comol full"
    ),
    ("multi target", "lora_input"): (
      "lora_input queryable_prior queryable_query queryable_prior_query queryable full_input"
    ),
  }
  rows, summary = [], results.summary
  for (setting, baseline), methods in methods_of.items():
    known = [name for name in methods.split() if name in set(summary["arm"])]
    chosen = summary[(summary["setting"] == setting) & (summary["baseline"] == baseline)]
    for _, row in chosen.set_index("arm", drop=False).loc[known].iterrows():
      rows.append(
        f"{setting} | {row['label']} | {row['trainable_params']:,.0f} |"
        f" {tables.with_interval(row['test_mse'], row['test_mse_low'], row['test_mse_high'])} |"
        f" {_difference(row)}"
      )
  return comparisons.markdown(["task", "method", "trainable", "test MSE", "difference"], rows)


def every_task(results: committed.Results) -> str:
  """Queryable LoRA beside LoRA in every setting, whatever the result."""
  summary, rows = results.summary, []
  for setting in summary["setting"].unique():
    for method, baseline in (("queryable", "lora"), ("queryable_prior", "lora_input")):
      setting_rows = summary[summary["setting"] == setting]
      ours = setting_rows[setting_rows["arm"] == method]
      ours = ours[ours["baseline"] == baseline]
      theirs = setting_rows[setting_rows["arm"] == baseline]
      if ours.empty or theirs.empty or (setting == "multi target" and baseline == "lora"):
        continue
      row, other = ours.iloc[0], theirs.iloc[0]
      rows.append(
        f"{setting} | {row['label']} | {style.method(baseline).label} |"
        f" {tables.number(row['test_mse'])} | {tables.number(other['test_mse'])} |"
        f" {_difference(row)} | {row['verdict']} |"
        f" {tables.number(row['spread'])} / {tables.number(other['spread'])} |"
        f" {tables.number(row['basin_decades'], 2)} / {tables.number(other['basin_decades'], 2)}"
      )
  header = ["setting", "method", "against", "test MSE", "its test MSE", "difference", "verdict"]
  return comparisons.markdown([*header, "spread over seeds", "basin, decades"], rows)


def _difference(row: pd.Series) -> str:
  if row["verdict"] == "baseline":
    return "baseline"
  text = tables.with_interval(
    row["relative"], row["relative_low"], row["relative_high"], tables.percent
  ).replace(" [", " % [")
  return f"**{text}**" if row["verdict"] == "better" else text


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """The claim on test performance.

  Rule: supported where the error is lower in most settings and higher in none, by Holm's p over the
  methods of a setting; task-dependent where it is lower in some.
  """
  rows = closest_baselines(results)
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
  return [study_lib.Claim(claim, verdict, evidence)]


def draw(results: committed.Results) -> figure.Figure:
  """Differences by setting, and how often each method's error is lower than LoRA's."""
  drawing = figure.Figure(figsize=(9.6, 4.4), layout="constrained")
  left, right = drawing.subplots(1, 2, width_ratios=(1, 1.1))
  _forest(left, closest_baselines(results).sort_values("relative", ascending=False))
  _bars(right, against_lora(results))
  drawing.legend(
    handles=[
      mpatches.Patch(facecolor=color, hatch=hatch, edgecolor=style.PAPER, label=label)
      for color, hatch, label in _LOOKS
    ],
    loc="outside lower right",
    ncols=3,
  )
  return drawing


def _forest(axis, rows: pd.DataFrame) -> None:
  names = []
  for place, row in enumerate(rows.to_dict("records")):
    look = style.method(row["arm"])
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
    instructed = row["arm"] != "queryable"
    names.append(row["setting"] + ("\n(with the instruction)" if instructed else ""))
  axis.axvline(0, color=style.INK, linewidth=0.8)
  axis.set_yticks(range(len(names)), names)
  axis.set_xlabel("difference in test MSE, % (10 seeds, 95 % interval)")
  axis.set_title("Queryable against LoRA, by setting")
  axis.grid(axis="x")


def _bars(axis, rows: pd.DataFrame) -> None:
  methods = style.ordered(rows["arm"])
  for place, key in enumerate(methods):
    number_by_verdict = holm_counts(rows[rows["arm"] == key])
    start = 0
    for number, (color, hatch, _) in zip(number_by_verdict, _LOOKS, strict=True):
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


STUDY = study_lib.Study(
  name="regression_error",
  question="Does Queryable LoRA predict better than LoRA on noisy regression?",
  about="A residual network is trained on a clean source and frozen; adapters of 8,192 parameters"
  " learn a shifted, noisy target on ten tasks, one of them at four noise levels. Every method"
  " searches the same seven learning rates on noisy validation rows and is compared on ten fresh"
  " seeds, paired by seed.",
  config="configs/regression.py",
  results="regression",
  claims=claims,
  tables={"counts": counts, "resolved": resolved, "deciding": deciding, "every_task": every_task},
  caption="Left: mean paired difference in test error of Queryable LoRA to LoRA in each setting, in"
  " percent, with 95 % bootstrap intervals over ten seeds; a filled mark's interval leaves out"
  " zero. On multi target both methods see the instruction. Right: in how many settings each"
  " method's error is significantly lower, not significantly different, or higher (Holm's p over"
  " the methods of a setting).",
  draw=draw,
  keep_curves=True,
  report_figures={
    "difference": (
      "difference",
      "Mean paired difference in test error of every method to its baseline, in percent, with 95 %"
      " bootstrap intervals over ten seeds; a filled mark's interval leaves out zero.",
    ),
    "noise": (
      "noise",
      "Test error (units of the source's variance) against the noise in the training targets, with"
      " 95 % bootstrap intervals over ten seeds.",
    ),
    "learning_rates": (
      "learning_rates",
      "Validation error of the search against the learning rate; bands reach from the least to the"
      " greatest of three seeds, a ring marks the chosen rate.",
    ),
    "curves": (
      "curves",
      "Validation error by training step of the final runs; bands reach from the least to the"
      " greatest of ten seeds.",
    ),
    "routing": ("routing", "Mean routing weight by block and atom, of one final run per method."),
    "parameters": (
      "parameters",
      "Test error against the number of trainable parameters, with 95 % bootstrap intervals.",
    ),
  },
  position=10,
)
