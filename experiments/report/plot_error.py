"""Figures of the test error: against LoRA, against the noise, against trainable parameters."""

import math

import numpy as np
import pandas as pd

from experiments.report import inputs, panels, style


def forest(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Paired difference to the baseline, one panel a setting and baseline."""
  compared = summary[(summary["num_pairs"] > 0) & np.isfinite(summary["relative"])]
  shown = study.shown_settings()
  keys = [tuple(k) for k in compared[inputs.SETTING].itertuples(index=False)]
  compared = compared[[key in shown for key in keys]]
  if compared.empty:
    return "Difference to the baseline: no data set has final runs of it and of another method."
  groups = list(compared.groupby([*inputs.SETTING, "baseline"], sort=True))
  methods = style.ordered(compared["method"])
  figure, axes = panels.grid(
    len(groups), height=0.75 + 0.175 * len(methods), columns=5, sharex=True, sharey=True
  )
  limit = _forest_limit(compared)
  several = compared.groupby(inputs.SETTING)["baseline"].nunique().max() > 1
  for panel, (key, rows) in zip(axes, groups, strict=True):
    _forest_panel(panel, rows, methods, limit)
    baseline = style.method(key[-1]).label
    panel.set_title(rows["setting"].iloc[0] + (f"\nvs {baseline}" if several else ""))
  axes[0].set_yticks(range(len(methods)), [style.method(m).label for m in methods])
  axes[0].set_ylim(len(methods) - 0.4, -0.6)
  names = {style.method(b).label for b in compared["baseline"]}
  against = names.pop() if len(names) == 1 else "the method named above the panel"
  panels.label_outer(axes, "difference in test MSE, %", "")
  return panels.Drawn(
    "difference",
    f"Difference in test error to {against}",
    f"Mean paired difference in test error to {against}, in percent, with its 95 % bootstrap "
    f"interval over {panels.seeds_text(compared)}. Left of the line is a lower error. A filled "
    "point's interval leaves out zero; a hollow point's does not, so the data do not tell the two "
    "methods apart. Triangles at the edge stand for values beyond the axis."
    + panels.middle_level_note(study, shown),
    figure,
  )


def _forest_limit(compared: pd.DataFrame) -> float:
  ends = compared[["relative", "relative_low", "relative_high"]].abs().to_numpy()
  ends = ends[np.isfinite(ends)]
  return min(ends.max() * 1.1, max(15.0, 1.5 * np.quantile(ends, 0.8)))


def _forest_panel(panel, rows: pd.DataFrame, methods: list[str], limit: float) -> None:
  panel.axvline(0, color=style.INK, linewidth=0.7)
  panel.grid(axis="x")
  panel.set_xlim(-limit, limit)
  panel.tick_params(axis="y", length=0)
  for row in rows.to_dict("records"):
    y, mean = methods.index(row["method"]), row["relative"]
    color = style.method(row["method"]).color
    if abs(mean) > limit:
      side = math.copysign(1, mean)
      panel.plot(side * limit * 0.96, y, ">" if side > 0 else "<", color=color, markersize=5)
      panel.annotate(
        f"{mean:+.0f} %".replace("-", "−"), (side * limit * 0.88, y), fontsize=7,
        ha="right" if side > 0 else "left", va="center_baseline", color=style.INK,
      )  # fmt: skip
      continue
    low, high = row["relative_low"], row["relative_high"]
    if math.isfinite(low):
      panel.plot([low, high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
    clear = row["verdict"] in ("better", "worse")
    face = color if clear else style.PAPER
    panel.plot(mean, y, "o", color=color, markerfacecolor=face, markersize=4.8)


def noise(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Test error against noise level, one panel a task and kind of noise."""
  rows = summary.drop_duplicates([*inputs.SETTING, "method"])
  rows = rows[np.isfinite(rows["test_mse"])]
  groups = [
    (key, group)
    for key, group in rows.groupby(["task", "noise_kind"], sort=True)
    if group["noise_level"].nunique() > 1
  ]
  if not groups:
    return "Error against noise level: no task was run at more than one noise level."
  figure, axes = panels.grid(len(groups), height=2.6)
  methods = style.ordered(pd.concat([group for _, group in groups])["method"])
  front = style.highlighted(methods)
  for panel, ((task, kind), group) in zip(axes, groups, strict=True):
    for key in [m for m in methods if m not in front] + front:
      line = group[group["method"] == key].sort_values("noise_level")
      if line.empty:
        continue
      if key not in front:
        panel.plot(line["noise_level"], line["test_mse"], color=style.MUTED, linewidth=0.7)
        continue
      look = style.method(key)
      panel.errorbar(
        line["noise_level"], line["test_mse"], _error_bars(line), color=look.color,
        linestyle=look.line, marker=look.marker, elinewidth=0.8,
      )  # fmt: skip
    ends = group[["test_mse", "test_mse_low", "test_mse_high"]].to_numpy()
    panels.log_axis(panel.yaxis, np.nanmin(ends), np.nanmax(ends))
    panel.set_xticks(sorted(group["noise_level"].unique()))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_title(f"{task}, {kind} noise".replace("_", " "))
    panel.grid(True)
  panels.label_outer(axes, "noise level", "test MSE")
  panels.legend(figure, _handles(methods, front))
  return panels.Drawn(
    "noise",
    "Error against noise level",
    "Mean test error at each level of the noise in the training targets; bars are 95 % bootstrap "
    "intervals over the seeds. A line that rises less than another loses less to the noise.",
    figure,
  )


def parameters(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Test error against the number of trainable parameters."""
  rows = summary.drop_duplicates([*inputs.SETTING, "method"])
  rows = rows[np.isfinite(rows["test_mse"])]
  shown = study.shown_settings()
  trained = rows[rows["trainable_params"] > 0]
  if trained["trainable_params"].nunique() < 2:
    return "Error against parameters: all methods have the same number of trainable parameters."
  figure, axes = panels.grid(len(shown), height=2.6)
  for panel, setting in zip(axes, shown, strict=True):
    here = trained[(trained[inputs.SETTING] == list(setting)).all(axis=1)]
    base = rows[(rows[inputs.SETTING] == list(setting)).all(axis=1)]["base_mse"].mean()
    for row in here.to_dict("records"):
      look = style.method(row["method"])
      panel.errorbar(
        row["trainable_params"], row["test_mse"], _error_bars(pd.DataFrame([row])),
        color=look.color, marker=look.marker, linestyle="none", elinewidth=0.8, markersize=6,
      )  # fmt: skip
    ends = here[["test_mse", "test_mse_low", "test_mse_high"]].to_numpy()
    high = np.nanmax(ends)
    if math.isfinite(base):
      panel.axhline(base, color=style.INK, linestyle=":", linewidth=1)
      high = max(high, base)
    panels.log_axis(panel.yaxis, np.nanmin(ends), high)
    panels.log_axis(
      panel.xaxis, trained["trainable_params"].min(), trained["trainable_params"].max()
    )
    panel.set_title(study.setting_label(setting))
    panel.grid(True)
  panels.label_outer(axes, "trainable parameters", "test MSE")
  handles = [panels.handle(k, linestyle="none") for k in style.ordered(trained["method"])]
  panels.legend(figure, [*handles, panels.handle("none", marker="", linewidth=1)])
  return panels.Drawn(
    "parameters",
    "Error against trainable parameters",
    "Mean test error of each method against the number of parameters it trains; bars are 95 % "
    "bootstrap intervals over the seeds. Further down is a lower error, further left is a smaller "
    "adapter. The dotted line is the frozen base without any adapter."
    + panels.middle_level_note(study, shown),
    figure,
  )


def _error_bars(rows: pd.DataFrame) -> np.ndarray:
  """Distances below and above the mean; zero where a mean has no interval."""
  low = (rows["test_mse"] - rows["test_mse_low"]).fillna(0).clip(lower=0)
  high = (rows["test_mse_high"] - rows["test_mse"]).fillna(0).clip(lower=0)
  return np.stack([low, high])


def _handles(methods: list[str], front: list[str]) -> list:
  rest = [m for m in methods if m not in front]
  return [panels.handle(m) for m in front] + ([panels.background_handle(rest)] if rest else [])
