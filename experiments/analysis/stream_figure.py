"""The figure of the stream study: errors along the stream, transfers, and the search."""

import numpy as np
import pandas as pd
from matplotlib import figure

from experiments.analysis import stream_tables
from experiments.report import style
from qlora_jax.studies import statistics

# Colour, marker and line of each arm; Okabe-Ito; markers and lines differ for print in grey.
_LOOKS = {
  "LoRA": ("#0072b2", "o", "-"),
  "Queryable, free atoms": ("#d55e00", "*", "-"),
  "Queryable, atoms frozen from the start": ("#e69f00", "^", "--"),
  "Queryable, atoms frozen after the first": ("#cc79a7", "v", "-."),
  "Queryable, router alone after the first": ("#009e73", "P", ":"),
  "LoRA, jointly": ("#0072b2", "s", "-"),
  "Queryable, jointly": ("#d55e00", "s", "-"),
}
_TASKS = {"multi_target": "targets, told by the instruction", "regimes": "regions of the input"}


def draw(tables: stream_tables.Tables, summary: pd.DataFrame) -> figure.Figure:
  """A column per task: the error over the parts seen so far, the transfers, and the search."""
  tasks = [task for task in _TASKS if task in set(summary["task"])]
  drawing = figure.Figure(figsize=(9.2, 9.2), layout="constrained")
  grid = drawing.subplots(3, len(tasks), squeeze=False)
  for column, task in enumerate(tasks):
    _along(grid[0, column], tables["errors"], summary, task)
    _transfers(grid[1, column], summary, task)
    _rates(grid[2, column], tables["runs"], task)
    grid[0, column].set_title(_TASKS[task])
  handles, labels = grid[0, 0].get_legend_handles_labels()
  drawing.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7.5)
  return drawing


def _along(axis, errors, summary, task) -> None:
  """Mean error over the parts seen so far, after each part; joint training as a line across."""
  for arm, (color, marker, line) in _LOOKS.items():
    arm_rows = summary[(summary["task"] == task) & (summary["arm"] == arm)]
    if arm_rows.empty:
      continue
    if arm.endswith("jointly"):
      row = arm_rows[arm_rows["quantity"] == "average error"].iloc[0]
      axis.axhline(row["mean"], color=color, linestyle=(0, (1, 1)), linewidth=1, label=arm)
      axis.axhspan(row["low"], row["high"], color=color, alpha=0.15, linewidth=0)
      continue
    matrix, _ = stream_tables.matrices(errors, task, arm)
    stages = np.arange(1, matrix.shape[1] + 1)
    seen = np.array([matrix[:, i - 1, :i].mean(axis=1) for i in stages])  # [T, seeds]
    intervals = [statistics.bootstrap_mean(errors_seen, num_resamples=2000) for errors_seen in seen]
    axis.plot(stages, seen.mean(axis=1), line, color=color, marker=marker, label=arm)
    low, high = ([getattr(interval, end) for interval in intervals] for end in ("low", "high"))
    axis.fill_between(stages, low, high, color=color, alpha=0.2, linewidth=0)
  axis.set_xlabel("parts trained on, one after another")
  axis.set_ylabel("test MSE over the parts seen\n(source variance = 1)")
  axis.set_ylim(bottom=0)
  axis.grid(axis="y")


def _rates(axis, runs, task) -> None:
  """Each learning rate of the search: validation error when learned, and over all parts at the end.

  Bars reach from the least to the greatest of the search's seeds.
  """
  runs = runs[(runs["task"] == task) & (runs["stage"] == "search")]
  for arm, (color, marker, line) in _LOOKS.items():
    arm_runs = runs[runs["arm"] == arm]
    if arm_runs.empty or arm.endswith("jointly"):
      continue
    groups = arm_runs.groupby("learning_rate")
    columns = ("validation_mse", "validation_mse_at_end")
    middle, low, high = ([groups[c].agg(f) for c in columns] for f in ("mean", "min", "max"))
    axis.errorbar(
      *middle,
      xerr=[middle[0] - low[0], high[0] - middle[0]],
      yerr=[middle[1] - low[1], high[1] - middle[1]],
      linestyle=line,
      color=color,
      marker=marker,
      elinewidth=0.6,
    )
  axis.set_xscale("log")
  axis.set_yscale("log")
  for scale in (axis.xaxis, axis.yaxis):
    scale.set_major_formatter(lambda value, _: f"{value:g}")
    scale.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[-1] in "235" else "")
  axis.set_xlabel("validation MSE of a part just learned (search, 3 seeds)")
  axis.set_ylabel("validation MSE over\nall parts at the end")
  axis.grid()


def _transfers(axis, summary, task) -> None:
  quantities = ("backward transfer", "forward transfer")
  arms = [arm for arm in _LOOKS if not arm.endswith("jointly")]
  for shift, arm in zip(np.linspace(-0.3, 0.3, len(arms)), arms, strict=True):
    arm_rows = summary[(summary["task"] == task) & (summary["arm"] == arm)].set_index("quantity")
    if arm_rows.empty:
      continue
    rows = arm_rows.loc[list(quantities)]
    color, marker, _ = _LOOKS[arm]
    axis.errorbar(
      rows["mean"],
      np.arange(2) + shift,
      xerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]],
      fmt=marker,
      color=color,
      capsize=2,
    )
  axis.axvline(0, color=style.INK, linewidth=0.8)
  axis.set_yticks(range(2), ["backward\ntransfer", "forward\ntransfer"])
  axis.set_ylim(1.5, -0.5)
  axis.set_xlabel("test MSE gained (mean of 10 seeds, 95 % interval)")
  axis.grid(axis="x")
