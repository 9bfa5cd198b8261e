"""The figure of the study of frozen networks: differences to LoRA by task, a mark per network."""

from collections.abc import Mapping

import pandas as pd
from matplotlib import figure
from matplotlib import lines as mlines

from experiments.report import style

_NETWORK, _MEAN, _OTHER = "#0072b2", style.INK, "#d55e00"
_MARKERS = ("s", "^")  # of other trainings on the main study's network
_MAIN = 0  # the main study's network


def draw(
  differences: pd.DataFrame, pooled: pd.DataFrame, others: Mapping[str, pd.Series]
) -> figure.Figure:
  """Draws the two tables of `experiments/studies/bases.py`.

  Args:
    others: label to differences by task in per cent, of other trainings on the main study's
      network.
  """
  tasks = list(pooled.sort_values("percent")["task"])[::-1]
  drawing = figure.Figure(figsize=(7.6, 0.42 * len(tasks) + 1.5), layout="constrained")
  axis = drawing.subplots()
  for place, task in enumerate(tasks):
    _task(axis, place, differences[differences["task"] == task], pooled, others)
  axis.axvline(0, color=style.INK, linewidth=0.8)
  names = [
    task.replace("_", " ") + ("\n(with the instruction)" if task == "multi_target" else "")
    for task in tasks
  ]
  axis.set_yticks(range(len(tasks)), names)
  axis.set_ylim(-0.6, len(tasks) - 0.4)
  axis.set_xlabel("difference in test MSE to LoRA, %")
  axis.grid(axis="x")
  drawing.legend(handles=_handles(others), loc="outside lower center", ncols=2)
  return drawing


def _task(axis, place: int, networks: pd.DataFrame, pooled: pd.DataFrame, others) -> None:
  count = len(networks)
  for number, row in enumerate(networks.sort_values("percent").itertuples()):
    y = place + 0.34 * ((number + 0.5) / count - 0.5) + 0.16
    axis.plot([row.percent_low, row.percent_high], [y, y], color=_NETWORK, linewidth=0.7, alpha=0.6)
    axis.plot(row.percent, y, "o", color=_NETWORK, markersize=3)
    if row.base == _MAIN:
      axis.plot(row.percent, y, "o", color=_OTHER, markersize=6, markerfacecolor="none")
  row = pooled[pooled["task"] == networks["task"].iloc[0]].iloc[0]
  y = place - 0.12
  axis.plot([row["percent_low"], row["percent_high"]], [y, y], color=_MEAN, linewidth=1.6)
  axis.plot(
    row["percent"],
    y,
    "D",
    color=_MEAN,
    markersize=5,
    markerfacecolor=style.PAPER if row["verdict"] == "not significant" else _MEAN,
  )
  for marker, values in zip(_MARKERS, others.values(), strict=False):
    axis.plot(
      values[row["task"]],
      place - 0.28,
      marker,
      color=_OTHER,
      markersize=4.5,
      markerfacecolor=style.PAPER,
    )


def _handles(others) -> list[mlines.Line2D]:
  networks, main, mean = (
    {"color": _NETWORK, "markersize": 3, "linewidth": 0.7},
    {"color": _OTHER, "markersize": 6, "markerfacecolor": "none", "linestyle": "none"},
    {"color": _MEAN, "markersize": 5, "linewidth": 1.6},
  )
  other = {"color": _OTHER, "linestyle": "none", "markerfacecolor": style.PAPER}
  mean_label = "mean over networks, Student's interval; hollow: not significant (Holm)"
  marks = [
    ("o", "a frozen network, interval over 10 seeds", networks),
    ("o", "the main study's network, trained again", main),
    ("D", mean_label, mean),
    *((marker, label, other) for marker, label in zip(_MARKERS, others, strict=False)),
  ]
  return [
    mlines.Line2D([], [], marker=marker, label=label, **look) for marker, label, look in marks
  ]
