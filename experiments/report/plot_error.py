"""Figures of the test error: against LoRA, against the noise, against trainable parameters."""

import dataclasses
import math

import matplotlib.ticker
import numpy as np
import pandas as pd

from experiments.report import inputs, measure, panels, style


def forest(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Paired difference to the baseline, one panel per setting and baseline."""
  of = study.measure
  compared = summary[(summary["num_pairs"] > 0) & np.isfinite(summary[of.contrast])]
  shown = study.shown_settings()
  keys = [tuple(k) for k in compared[inputs.SETTING].itertuples(index=False)]
  compared = compared[[key in shown for key in keys]]
  if compared.empty:
    return "Difference to the baseline: no data set has final runs of it and of another method."
  groups = list(compared.groupby([*inputs.SETTING, "baseline"], sort=True))
  methods = style.ordered(compared["arm"])
  figure, axes = panels.grid(
    len(groups), height=0.75 + 0.175 * len(methods), columns=5, sharex=True, sharey=True
  )
  limit = _forest_limit(compared, of.contrast)
  for panel, (key, rows) in zip(axes, groups, strict=True):
    _forest_panel(panel, rows, methods, limit, of)
    both = compared[(compared[inputs.SETTING] == list(key[:-1])).all(axis=1)]["baseline"].nunique()
    versus = f"\nvs {style.method(key[-1]).label}" if both > 1 else ""
    panel.set_title(rows["setting"].iloc[0] + versus)
  axes[0].set_yticks(range(len(methods)), [style.method(m).label for m in methods])
  axes[0].set_ylim(len(methods) - 0.4, -0.6)
  usual = style.method(compared["baseline"].mode().iloc[0]).label
  several = compared["baseline"].nunique() > 1
  unit = "percent" if of.relative else of.contrast_unit
  against = f"{usual}, or the method named above the panel" if several else usual
  label = "test MSE, %" if of.relative else f"{of.noun}, {of.contrast_unit}"
  panels.label_outer(axes, f"difference in {label}", "")
  return panels.Drawn(
    "difference",
    f"Difference in {of.noun} to {usual}",
    f"Mean paired difference in {of.noun} to {against}, in {unit}, with its 95 % interval "
    f"over {panels.seeds_text(compared)}. {'Left' if of.lower else 'Right'} of the line "
    f"is a {of.better} {of.mean}. A filled point's interval leaves out zero; a hollow point's does "
    "not, so the data do not tell the two methods apart. Triangles at the edge stand for values "
    "beyond the axis."
    + (
      " A cross marks a method with a run that diverged; it shows the other runs."
      if (compared["verdict"] == "diverged").any()
      else ""
    )
    + panels.middle_level_note(study, shown),
    figure,
  )


def _forest_limit(compared: pd.DataFrame, column: str) -> float:
  trained = compared[compared["arm"] != "none"]  # the base, far off, would set the scale
  compared = trained if len(trained) else compared
  ends = compared[[column, f"{column}_low", f"{column}_high"]].abs().to_numpy()
  ends = ends[np.isfinite(ends)]
  return min(ends.max() * 1.1, max(15.0, 1.5 * np.quantile(ends, 0.8))) or 1.0


def _forest_panel(
  panel, rows: pd.DataFrame, methods: list[str], limit: float, of: measure.Measure
) -> None:
  panel.axvline(0, color=style.INK, linewidth=0.7)
  panel.grid(axis="x")
  panel.set_xlim(-limit, limit)
  panel.tick_params(axis="y", length=0)
  panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
  for row in rows.to_dict("records"):
    y, mean = methods.index(row["arm"]), row[of.contrast]
    color = style.method(row["arm"]).color
    if abs(mean) > limit:
      side = math.copysign(1, mean)
      panel.plot(side * limit * 0.96, y, ">" if side > 0 else "<", color=color, markersize=5)
      panel.annotate(
        f"{mean:+.0f}{' %' if of.relative else ''}".replace("-", "−"),
        (side * limit * 0.88, y),
        fontsize=7,
        ha="right" if side > 0 else "left",
        va="center_baseline",
        color=style.INK,
      )
      continue
    low, high = row[f"{of.contrast}_low"], row[f"{of.contrast}_high"]
    if math.isfinite(low):
      panel.plot([low, high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
    clear = row["verdict"] in ("better", "worse")
    face = color if clear else style.PAPER
    marker = "X" if row["verdict"] == "diverged" else "o"
    panel.plot(mean, y, marker, color=color, markerfacecolor=face, markersize=4.8)


def noise(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Test error against noise level, one panel per task and kind of noise."""
  rows = summary.drop_duplicates([*inputs.SETTING, "arm"])
  rows = rows[np.isfinite(rows["test_mse"])]
  # A method run at one level has no line to draw: controls often are.
  groups = []
  for key, group in rows.groupby(["task", "noise_kind"], sort=True):
    levels = group.groupby("arm")["noise_level"].transform("nunique")
    if (levels > 1).any():
      groups.append((key, group[levels > 1]))
  if not groups:
    return "Error against noise level: no task was run at more than one noise level."
  figure, axes = panels.grid(len(groups), height=2.6)
  methods = style.ordered(pd.concat([group for _, group in groups])["arm"])
  front = style.highlighted(methods)
  for panel, ((task, kind), group) in zip(axes, groups, strict=True):
    for key in [m for m in methods if m not in front] + front:
      line = group[group["arm"] == key].sort_values("noise_level")
      if line.empty:
        continue
      if key not in front:
        panel.plot(line["noise_level"], line["test_mse"], color=style.MUTED, linewidth=0.7)
        continue
      look = style.method(key)
      panel.errorbar(
        line["noise_level"],
        line["test_mse"],
        _error_bars(line),
        color=look.color,
        linestyle=look.line,
        marker=look.marker,
        elinewidth=0.8,
      )
    panels.log_axis(panel.yaxis, *_limits(group))
    levels = sorted(group["noise_level"].unique())
    if levels[0] > 0 and levels[-1] > 5 * levels[0]:
      panels.log_axis(panel.xaxis, levels[0], levels[-1])
    panel.set_xticks(levels, [f"{level:g}" for level in levels])
    of_kind = "" if kind in ("none", "own") else f", {kind} noise"
    panel.set_title(f"{task}{of_kind}".replace("_", " "))
    panel.grid(True)
  panels.label_outer(axes, "noise level", "test MSE")
  panels.legend(figure, panels.handles(methods, front))
  return panels.Drawn(
    "noise",
    "Error against noise level",
    "Mean test error at each level of the noise in the training targets; bars are 95 % "
    "intervals over the seeds. A line that rises less than another loses less to the noise.",
    figure,
  )


def parameters(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Test error against the number of trainable parameters."""
  rows = summary.drop_duplicates([*inputs.SETTING, "arm"])
  rows = rows[np.isfinite(rows["test_mse"])]
  shown = study.shown_settings()
  trained = rows[rows["trainable_params"] > 0]
  if trained["trainable_params"].nunique() < 2:
    return "Error against parameters: all methods have the same number of trainable parameters."
  fewest, most = trained["trainable_params"].min(), trained["trainable_params"].max()
  methods = style.ordered(trained["arm"])
  front = style.highlighted(methods)
  figure, axes = panels.grid(len(shown), height=2.6)
  for panel, setting in zip(axes, shown, strict=True):
    here = trained[(trained[inputs.SETTING] == list(setting)).all(axis=1)]
    for row in here.to_dict("records"):
      look, size = style.method(row["arm"]), 6
      if row["arm"] not in front:
        look, size = dataclasses.replace(look, color=style.MUTED, marker="."), 5
      panel.errorbar(
        row["trainable_params"],
        row["test_mse"],
        _error_bars(pd.DataFrame([row])),
        color=look.color,
        marker=look.marker,
        linestyle="none",
        elinewidth=0.8,
        markersize=size,
        zorder=3 if row["arm"] in front else 2,
      )
    panels.log_axis(panel.yaxis, *_limits(here))
    panels.log_axis(panel.xaxis, fewest, most)
    panel.set_title(study.setting_label(setting))
    panel.grid(True)
  panels.label_outer(axes, "trainable parameters", "test MSE")
  handles = [panels.handle(k, linestyle="none") for k in front]
  if len(front) < len(methods):
    rest = panels.background_handle([m for m in methods if m not in front])
    rest.set(marker=".", linestyle="none")
    handles.append(rest)
  panels.legend(figure, handles)
  return panels.Drawn(
    "parameters",
    "Error against trainable parameters",
    "Mean test error of each method against the number of parameters it trains; bars are 95 % "
    "intervals over the seeds. Further down is a lower error, further left is a smaller "
    "adapter." + panels.middle_level_note(study, shown),
    figure,
  )


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
  """What a log axis shows of means and intervals: a factor of 10 beyond the means at most.

  Student's interval of two or three seeds can be that wide, and its lower end below zero.
  """
  ends, means = rows[["test_mse", "test_mse_low", "test_mse_high"]], rows["test_mse"]
  low, high = np.nanmin(ends), np.nanmax(ends)
  return max(low, means.min() / 10), min(high, means.max() * 10)


def _error_bars(rows: pd.DataFrame) -> np.ndarray:
  """Distances below and above the mean; zero where a mean has no interval."""
  low = (rows["test_mse"] - rows["test_mse_low"]).fillna(0).clip(lower=0)
  high = (rows["test_mse_high"] - rows["test_mse"]).fillna(0).clip(lower=0)
  return np.stack([low, high])
