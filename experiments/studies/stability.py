"""Does Queryable LoRA train more steadily than LoRA? The paper's second claim.

It is answered from the runs of the main study, and from a second training of its comparisons that
records losses every ten steps. `docs/protocol.md` defines the quantities.

  python launch.py --config=configs/regression.py:stability --workdir=runs/stability --sweep
  python -m experiments keep --from=runs/stability --results=experiments/results/stability
  python -m experiments stability
"""

import functools

import numpy as np
import pandas as pd
from matplotlib import figure

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.report import inputs, panels, stability, style, tables
from experiments.studies import regression_error
from qlora_jax.studies import statistics

_RATIO = ["spread_ratio", "spread_ratio_low", "spread_ratio_high"]


@functools.cache
def by_method(results: committed.Results) -> pd.DataFrame:
  """The defined quantities, one row per method; see `report/stability.py`."""
  return stability.table(results.study, results.summary)


@functools.cache
def pairs(results: committed.Results) -> pd.DataFrame:
  """Queryable LoRA beside its baseline, with the baseline's basin: one row per setting."""
  rows = results.summary.drop_duplicates([*inputs.SETTING, "arm"])
  rows = rows[[*inputs.SETTING, "arm", "basin_decades", "diverged_share", "search_runs"]]
  return regression_error.closest_baselines(results).merge(
    rows.rename(columns={"arm": "baseline"}),
    on=[*inputs.SETTING, "baseline"],
    suffixes=("", "_other"),
  )


@functools.cache
def spikes(results: committed.Results) -> pd.DataFrame:
  """Loss spikes per run by task, 'ours' and 'theirs', from losses recorded every ten steps."""
  runs = stability.spikes(results.of("stability").study)
  pair = {
    name: side
    for both in (("lora", "queryable"), ("lora_input", "queryable_prior"))
    for name, side in zip(both, ("theirs", "ours"), strict=True)
  }
  return runs.assign(side=runs["arm"].map(pair)).pivot_table(
    index="task", columns="side", values="spikes", aggfunc=["mean", "sum", "count"]
  )


def _spiked(results: committed.Results) -> tuple[str, str]:
  """Verdict and evidence on loss spikes."""
  rows = spikes(results)
  means = statistics.paired_bootstrap(rows["mean", "ours"], rows["mean", "theirs"])
  verdict = "supported" if means.high < 0 else "not supported" if means.low > 0 else "inconclusive"
  counts = [f"{rows['sum', side].sum():.0f}" for side in ("ours", "theirs")]
  runs = f"{rows['count', 'ours'].sum():.0f} runs each"
  ends = f"[{tables.signed(means.low, 2)}, {tables.signed(means.high, 2)}] over {len(rows)} tasks"
  return verdict, (
    f"{counts[0]} against {counts[1]} in {runs}, losses recorded every ten steps;"
    f" {tables.signed(means.mean, 2)} per run {ends}"
  )


def table(results: committed.Results) -> str:
  """Every method's stability over all settings."""
  rows = [
    [row["label"], str(row["settings"]), *stability.cells(row)]
    for row in by_method(results).to_dict("records")
    if row["arm"] != "none"
  ]
  header = (
    "method | settings | search runs | diverged | loss spikes | basin, decades | narrowest |"
    " spread, % of error | spread below / like / above LoRA's | final runs without result"
  )
  return comparisons.markdown(header, rows)


def by_setting(results: committed.Results) -> str:
  """Spread over seeds and basin of Queryable LoRA beside its baseline's, setting by setting."""
  rows = [
    [
      row["setting"],
      row["label"],
      style.method(row["baseline"]).label,
      tables.with_interval(*(row[name] for name in _RATIO), lambda x: tables.number(x, 2)),
      _word(row),
      f"{tables.number(row['basin_decades'], 2)} / {tables.number(row['basin_decades_other'], 2)}",
    ]
    for row in pairs(results).to_dict("records")
  ]
  header = ["setting", "method", "against", "ratio of spreads", "verdict", "basin, decades"]
  return comparisons.markdown(header, rows)


def _word(row: dict) -> str:
  if row["spread_ratio_high"] < 1:
    return "steadier"
  return "less steady" if row["spread_ratio_low"] > 1 else "not significant"


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """The claim on training stability, quantity by quantity.

  Rule: each of four quantities is judged by its interval or its counts. The whole is supported
  where at least one is supported and none is not supported.
  """
  rows = pairs(results)
  number = statistics.win_tie_loss(rows[_RATIO].to_numpy() - 1)
  spread = (
    f"spread over seeds smaller on {number.wins}, larger on {number.losses} and not significant on"
    f" {number.ties} of {len(rows)} settings; median ratio"
    f" {tables.number(rows['spread_ratio'].median(), 2)}"
  )
  both = rows[["basin_decades", "basin_decades_other"]].dropna()
  basin = statistics.paired_bootstrap(*both.to_numpy().T)
  width = (
    f"{tables.signed(basin.mean, 2)} decades [{tables.signed(basin.low, 2)},"
    f" {tables.signed(basin.high, 2)}] over {len(both)} settings"
  )
  ours, theirs = (
    round((rows[f"diverged_share{end}"] * rows[f"search_runs{end}"]).sum())
    for end in ("", "_other")
  )
  runs = int(rows["search_runs"].sum())
  parts = [
    study_lib.Claim("smaller spread over seeds than LoRA", _verdict(number), spread),
    study_lib.Claim(
      "a wider basin of learning rates than LoRA",
      "supported" if basin.low > 0 else "not supported" if basin.high < 0 else "inconclusive",
      width,
    ),
    study_lib.Claim(
      "fewer diverged runs than LoRA",
      "not supported" if ours >= theirs else "inconclusive",
      f"{ours} against {theirs} of {runs} search runs over seven learning rates",
    ),
    study_lib.Claim("fewer loss spikes than LoRA", *_spiked(results)),
  ]
  verdicts = [part.verdict for part in parts]
  supported, against = verdicts.count("supported"), verdicts.count("not supported")
  whole = "inconclusive" if not supported and not against else "not supported"
  if supported and not against:
    whole = "supported"
  evidence = (
    f"of the four quantities below {supported} supported, {against} not supported,"
    f" {verdicts.count('inconclusive')} inconclusive"
  )
  return [study_lib.Claim("more stable training than LoRA (the paper's)", whole, evidence), *parts]


def _verdict(number: statistics.Counts) -> str:
  if number.wins > number.losses and number.wins > number.ties:
    return "supported"
  return "not supported" if number.losses >= number.wins else "inconclusive"


def draw(results: committed.Results) -> figure.Figure:
  """Spread and basin of each setting, and the diverged runs of each method."""
  rows = pairs(results).sort_values("spread_ratio", ascending=False)
  drawing = figure.Figure(figsize=(10.4, 4.4), layout="constrained")
  left, middle, right = drawing.subplots(1, 3, width_ratios=(1.15, 0.9, 1))
  _spreads(left, rows)
  _basins(middle, rows)
  middle.sharey(left)
  middle.tick_params(axis="y", labelleft=False)
  _diverged(right, by_method(results))
  drawing.legend(handles=_handles(), loc="outside lower left", ncols=3)
  return drawing


def _spreads(axis, rows: pd.DataFrame) -> None:
  for place, row in enumerate(rows.to_dict("records")):
    look, clear = style.method(row["arm"]), _word(row) != "not significant"
    axis.plot([row[_RATIO[1]], row[_RATIO[2]]], [place, place], color=look.color)
    axis.plot(
      row[_RATIO[0]],
      place,
      marker=look.marker,
      color=look.color,
      markersize=6,
      markerfacecolor=look.color if clear else style.PAPER,
    )
  axis.axvline(1, color=style.INK, linewidth=0.8)
  panels.log_axis(axis.xaxis, rows[_RATIO[1]].min(), rows[_RATIO[2]].max())
  axis.set_yticks(range(len(rows)), rows["setting"])
  axis.set_xlabel("ratio of spreads over 10 seeds\n(95 % interval)")
  axis.set_title("Spread: left of 1 is steadier")
  axis.grid(axis="x")


def _basins(axis, rows: pd.DataFrame) -> None:
  theirs = style.method("lora")
  for place, row in enumerate(rows.to_dict("records")):
    ours = style.method(row["arm"])
    axis.plot(
      [row["basin_decades"], row["basin_decades_other"]],
      [place] * 2,
      color=style.MUTED,
      linewidth=0.8,
      zorder=1,
    )
    axis.plot(
      row["basin_decades_other"],
      place,
      theirs.marker,
      color=theirs.color,
      markerfacecolor=style.PAPER,
    )
    axis.plot(row["basin_decades"], place, ours.marker, color=ours.color, markersize=6)
  axis.set_xlim(left=0)
  axis.set_xlabel("basin, decades of\nlearning rate")
  axis.set_title("Basin: wider is easier to tune")
  axis.grid(axis="x")


def _handles() -> list:
  ours, prior, lora = (style.method(key) for key in ("queryable", "queryable_prior", "lora"))
  labels = ("Queryable", "Queryable + prior, of multi target")
  handles = [
    panels.mark(label, color=look.color, marker=look.marker)
    for look, label in zip((ours, prior), labels, strict=True)
  ]
  label = "LoRA; of multi target LoRA with instruction"
  hollow = {"color": lora.color, "marker": lora.marker, "markerfacecolor": style.PAPER}
  return [*handles, panels.mark(label, **hollow)]


def _diverged(axis, rows: pd.DataFrame) -> None:
  rows = rows[rows["arm"] != "none"]
  shares = 100 * rows["diverged"].to_numpy()
  looks = [style.method(key) for key in rows["arm"]]
  axis.hlines(np.arange(len(rows)), 0, shares, color=style.MUTED, linewidth=0.8)
  for place, (share, look) in enumerate(zip(shares, looks, strict=True)):
    axis.plot(share, place, marker=look.marker, color=look.color, clip_on=False)
  axis.set_yticks(range(len(rows)), [look.label for look in looks])
  axis.set_ylim(len(rows) - 0.4, -0.6)
  axis.set_xlim(left=0)
  axis.set_xlabel("search runs that diverged, %")
  axis.set_title("Diverged over the grid of rates")
  axis.grid(axis="x")


STUDY = study_lib.Study(
  name="stability",
  question="Does Queryable LoRA train more steadily than LoRA?",
  about="Four quantities that [the protocol](../docs/protocol.md) defines, over the same runs: the"
  " spread over ten seeds, the width of the basin of learning rates within 5 % of the best, the"
  " share of the search's runs that diverge, and the number of loss spikes. The spread is compared"
  " by a bootstrap over pairs of seeds, the basin by a bootstrap over settings.",
  config="configs/regression.py",
  results="regression",
  claims=claims,
  tables={"stability": table, "stability_settings": by_setting},
  caption="Left: standard deviation of the test error over ten final seeds, as a ratio to LoRA's"
  " over the same seeds, with 95 % bootstrap intervals; a filled mark's interval leaves out 1."
  " Middle: decades of learning rate whose mean validation error is within 5 % of the best."
  " Right: share of the search's runs, at seven learning rates, that end worse than the frozen base"
  " or not finite. On multi target Queryable LoRA with the prior is compared with LoRA that sees"
  " the instruction, too.",
  draw=draw,
  keep_curves=True,
  position=40,
)
