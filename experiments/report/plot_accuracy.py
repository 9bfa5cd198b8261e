"""Figures of a language model's answers: exact match by method and split, and by task."""

import math

import matplotlib.figure
import matplotlib.lines
import numpy as np
import pandas as pd

from experiments.report import inputs, measure, panels, style, tables

_DARK = 55.0  # percent: above it a cell's number is written in white
_ON_DARK = "#fefefe"  # not the paper's own white, which follows the page's theme


def splits(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Exact match of each method, one panel a data set and split, with the base as a line."""
  of = study.measure
  if of is not measure.EXACT_MATCH:
    return "Exact match by split: the study has no test split."
  rows = summary.drop_duplicates([*inputs.SETTING, "arm"])
  quantities = [q for q in (of, *of.also) if q.scale == of.scale and rows[q.key].notna().any()]
  wanted = [(s, q) for s in study.shown_settings() for q in quantities]
  methods = style.ordered(rows["arm"])
  figure, axes = panels.grid(
    len(wanted), height=1.1 + 0.24 * len(methods), columns=2, sharex=True, sharey=True
  )
  several = len(study.shown_settings()) > 1
  for panel, (setting, quantity) in zip(axes, wanted, strict=True):
    here = rows[(rows[inputs.SETTING] == list(setting)).all(axis=1)]
    bases = {"+prompt" in m: b for m, b in zip(here["arm"], here[quantity.base], strict=True)}
    for prompted, base in bases.items():
      if math.isfinite(base):
        panel.axvline(base, color=style.INK, linewidth=0.9, linestyle="--" if prompted else ":")
    for row in here.to_dict("records"):
      place, look = methods.index(row["arm"]), style.method(row["arm"])
      low, high = row[f"{quantity.key}_low"], row[f"{quantity.key}_high"]
      if math.isfinite(low):
        panel.plot([low, high], [place] * 2, color=look.color, linewidth=1.6)
      panel.plot(row[quantity.key], place, "o", color=look.color, markersize=5)
    split = "known wordings" if quantity.key == "test_seen_accuracy" else "new wordings"
    panel.set_title(f"{study.setting_label(setting)}, {split}" if several else split)
    panel.set_xlim(0, 100)
    panel.grid(axis="x")
    panel.tick_params(axis="y", length=0)
  axes[0].set_yticks(range(len(methods)), [style.method(m).label for m in methods])
  axes[0].set_ylim(len(methods) - 0.5, -0.5)
  panels.label_outer(axes, "exact match, %", "")
  lines = {
    prompted: matplotlib.lines.Line2D(
      [],
      [],
      color=style.INK,
      linewidth=0.9,
      linestyle="--" if prompted else ":",
      label=style.method("none+prompt" if prompted else "none").label,
    )
    for prompted in sorted({"+prompt" in m for m in methods})
  }
  panels.legend(figure, list(lines.values()))
  return panels.Drawn(
    "accuracy",
    "Exact match on inputs that training did not see",
    f"{of.meaning}. Known wordings: the same inputs under instructions that training used. "
    f"Points are means over {panels.seeds_text(rows)}, bars 95 % intervals where there "
    "is more than one seed. The broken lines are the model before training.",
    figure,
  )


def tasks(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Exact match of each method on each task of a data set, as a map with numbers."""
  table = tables.by_task(study)
  if table.empty:
    return "Exact match by task: the study has no scores by task."
  del summary
  groups = [(key, rows) for key, rows in table.groupby(["task", "split"], sort=True)]
  methods = {key: style.ordered(rows["arm"]) for key, rows in groups}
  wide = max(rows["name"].nunique() for _, rows in groups)
  heights = [len(methods[key]) for key, _ in groups]
  figure = matplotlib.figure.Figure(
    figsize=(
      min(panels.WIDTH, max(7.6, 2.6 + 0.85 * wide)),
      0.25 * sum(heights) + 0.9 * len(groups) + 0.3,
    ),
    layout="constrained",
  )
  axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
  several = table["task"].nunique() > 1
  for panel, ((setting, split), rows) in zip(axes, groups, strict=True):
    cells = rows.pivot(index="arm", columns="name", values="accuracy")
    cells = cells.loc[methods[setting, split]]
    panel.pcolormesh(
      np.arange(cells.shape[1] + 1) - 0.5,
      np.arange(cells.shape[0] + 1) - 0.5,
      cells.to_numpy(),
      vmin=0,
      vmax=100,
      cmap="Blues",
      edgecolors="face",
      linewidth=0.1,
    )
    for (y, x), value in np.ndenumerate(cells.to_numpy()):
      if math.isfinite(value):
        color = _ON_DARK if value > _DARK else "black"
        size = 7.5 if wide <= 12 else 6
        panel.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=size)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_yticks(range(len(cells)), [style.method(m).label for m in cells.index])
    names = [str(name).replace("_", " ") for name in cells.columns]
    panel.set_xticks(
      range(len(names)), names, rotation=30 if wide > 4 else 0, ha="right" if wide > 4 else "center"
    )
    meaning = measure.SPLITS[split]
    panel.set_title(f"{setting}, {meaning}".replace("_", " ") if several else meaning)
    panel.invert_yaxis()
  return panels.Drawn(
    "tasks",
    "Exact match by task",
    "Percent of a task's answers that match exactly, mean over the final runs of a method; the "
    "frozen base is the model before training. The same numbers are in tasks.csv.",
    figure,
  )
