"""The figure of the ablations: each level's difference to its reference, a panel a task."""

import pathlib

import pandas as pd
from matplotlib import figure
from matplotlib import lines as mlines

from experiments.report import style

_BETTER, _WORSE = "#0072b2", "#d55e00"


def draw(levels: pd.DataFrame, target: pathlib.Path) -> None:
  """Writes `target`.svg and .png from `analysis.levels`."""
  with style.context():
    compared = levels[levels["percent"].notna()]
    tasks = list(dict.fromkeys(compared["task"]))
    rows = max((compared["task"] == task).sum() for task in tasks)
    made = figure.Figure(figsize=(9.6, 1.6 + 0.19 * rows), layout="constrained")
    panels = made.subplots(1, len(tasks), squeeze=False)[0]
    lowest = min(
      _panel(axis, compared[compared["task"] == task])
      for axis, task in zip(panels, tasks, strict=True)
    )
    for axis, task in zip(panels, tasks, strict=True):
      axis.set_ylim(lowest - 1, 0)
      axis.set_title(f"{task.replace('_', ' ')}, noise 0.5")
    made.legend(handles=_handles(), loc="outside lower center", ncols=4)
    made.savefig(target.with_suffix(".svg"))
    made.savefig(target.with_suffix(".png"), dpi=200)


def _panel(axis, table: pd.DataFrame) -> float:
  """Draws a task's levels from the top down; returns the height of the last."""
  order = list(dict.fromkeys(table["factor"]))
  height, ticks, before = 0.0, {}, None
  for row in sorted(table.itertuples(), key=lambda each: order.index(each.factor)):
    height -= 1.5 if before not in (None, row.factor) else 1.0
    before = row.factor
    ticks[height] = f"{row.factor}: {row.level}"
    sure = row.p_holm < 0.05
    color = style.MUTED if not sure else _BETTER if row.percent < 0 else _WORSE
    axis.plot([row.percent_low, row.percent_high], [height] * 2, color=color, linewidth=1.4)
    axis.plot(
      row.percent,
      height,
      "o" if row.matched else "D",
      color=color,
      markersize=4.5,
      markerfacecolor=color if sure else style.PAPER,
    )
  axis.axvline(0, color=style.INK, linewidth=0.6)
  axis.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
  axis.set_xlabel("change of test MSE to the reference, %")
  axis.grid(axis="x")
  return height


def _handles() -> list[mlines.Line2D]:
  marks = (
    ("o", _BETTER, _BETTER, "lower error (p < .05, Holm)"),
    ("o", _WORSE, _WORSE, "higher error (p < .05, Holm)"),
    ("o", style.MUTED, style.PAPER, "not significant"),
    ("D", style.INK, style.INK, "parameters not matched"),
  )
  return [
    mlines.Line2D(
      [], [], color=color, marker=marker, linestyle="none", markerfacecolor=face, label=label
    )
    for marker, color, face, label in marks
  ]
