"""Figures of training: learning curves, and the error against the learning rate."""

import matplotlib.ticker
import numpy as np
import pandas as pd

from experiments.report import inputs, panels, style, tables


def curves(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """The loss by step of the final runs, mean and range over the seeds."""
  if study.curves is None:
    return "Learning curves: the study has no curves.parquet."
  final = study.stage("final")[["trial_id", *inputs.SETTING, "arm"]]
  data = study.curves.merge(final, on="trial_id")
  data = data[data["arm"] != "none"]
  of = study.measure
  unseen = of.curve == of.validation
  diverged = not np.isfinite(data[of.curve]).all()
  data = data[np.isfinite(data[of.curve])]
  shown = [s for s in study.shown_settings() if _of(data, s).any()]
  if not shown:
    return "Learning curves: curves.parquet has no step of a final run."
  figure, axes = panels.grid(len(shown), height=2.5)
  methods = style.ordered(data["arm"])
  front = style.highlighted(methods)
  for panel, setting in zip(axes, shown, strict=True):
    here = data[_of(data, setting)]
    _curves_panel(panel, here, of.curve, methods, front)
    panel.set_title(study.setting_label(setting))
  panels.label_outer(axes, "training step", of.curve_name)
  panels.legend(figure, panels.handles(methods, front))
  return panels.Drawn(
    "curves",
    "Learning curves",
    f"{of.curve_noun} during the final runs, each method at its chosen learning rate: the mean "
    f"over {panels.seeds_text(summary)}, with a band from the least to the greatest"
    f"{_band_note(front)}. A wide band means that the seed matters"
    + ("; a line that turns up again means that training overfits the noise" if unseen else "")
    + "."
    + (" Runs that diverged are left out from where they did." if diverged else "")
    + panels.middle_level_note(study, shown),
    figure,
  )


def _curves_panel(
  panel, here: pd.DataFrame, column: str, methods: list[str], front: list[str]
) -> None:
  ends = []
  for index, key in enumerate([m for m in methods if m not in front] + front):
    steps = here[here["arm"] == key].groupby("step")[column]
    if not len(steps):
      continue
    mean, low, high = steps.mean(), steps.min(), steps.max()
    if key not in front:
      panel.plot(mean.index, mean, color=style.MUTED, linewidth=0.6, zorder=1)
    else:
      look = style.method(key)
      every = max(1, len(mean) // 5)
      if key in _banded(front):
        panel.fill_between(mean.index, low, high, color=look.color, alpha=0.15, linewidth=0)
      panel.plot(
        mean.index,
        mean,
        color=look.color,
        linestyle=look.line,
        marker=look.marker,
        markevery=(index % every, every),
        markersize=4.5,
        zorder=3,
      )
      ends += [low.min(), high.max()] if key in _banded(front) else [mean.min(), mean.max()]
  panels.log_axis(panel.yaxis, min(ends), max(ends))
  ticks = matplotlib.ticker.MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True)
  panel.xaxis.set_major_locator(ticks)
  panel.xaxis.set_major_formatter(lambda value, _: panels.short(value) if value else "0")
  panel.set_xlim(left=0)
  panel.grid(True)


def _banded(front: list[str]) -> list[str]:
  """The methods with a band: all of a few, otherwise those that the headline compares."""
  named = ("lora", "lora_input", "lora+prompt", *style.SUBJECTS.values(), style.DECIDING)
  return front if len(front) <= 5 else [m for m in front if m in named]


def _band_note(front: list[str]) -> str:
  names = [style.method(m).label for m in _banded(front)]
  return "" if len(names) == len(front) else f" for {', '.join(names)}"


def learning_rates(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """The validation loss of the search against the learning rate."""
  search = study.stage("search")
  search = search[search["learning_rate"] > 0]
  shown = [
    s for s in study.shown_settings() if search[_of(search, s)]["learning_rate"].nunique() > 1
  ]
  if not shown:
    return "Learning-rate sensitivity: the search has fewer than two learning rates."
  of = study.measure
  figure, axes = panels.grid(len(shown), height=2.6)
  searched = {tuple(s): search[_of(search, s)] for s in shown}
  methods = style.ordered(search["arm"])
  methods = [m for m in methods if m != "none"]
  front = style.highlighted(methods)
  chosen = summary.drop_duplicates([*inputs.SETTING, "arm"])
  for panel, setting in zip(axes, shown, strict=True):
    rates = chosen[_of(chosen, setting)].set_index("arm")["learning_rate"]
    _rates_panel(panel, searched[setting], of.validation, methods, front, rates)
    panel.set_title(study.setting_label(setting))
  panels.label_outer(axes, "learning rate", of.validation_name)
  ring = panels.handle(
    "none", label="chosen rate", linestyle="none", marker="o", markersize=9, fillstyle="none"
  )
  cross = panels.handle(
    "none", label="a run diverged, or off the scale", linestyle="none", marker="^"
  )
  best = panels.handle(
    "lora", label="LoRA at its best rate", linewidth=0.8, marker="", linestyle=":"
  )
  extra = [ring, cross] + ([best] if "lora" in methods else [])
  panels.legend(figure, panels.handles(methods, front) + extra)
  return panels.Drawn(
    "learning_rates",
    "Sensitivity to the learning rate",
    f"{of.validation_noun} of the search runs against the learning rate, both on log scales: the "
    f"mean over the seeds, with a band from the least to the greatest{_band_note(front)}. A flat, "
    "wide valley means that the learning rate needs little tuning; a curve that shoots up means "
    "that training breaks down there. A ring marks the rate used for the final runs."
    + panels.middle_level_note(study, shown),
    figure,
  )


def _rates_panel(
  panel, here: pd.DataFrame, column: str, methods: list[str], front: list[str], chosen: pd.Series
) -> None:
  means = {m: tables.search_means(here[here["arm"] == m], column) for m in methods}
  means = {m: t for m, t in means.items() if len(t)}
  finite = np.concatenate([t["mean"][np.isfinite(t["mean"])] for t in means.values()])
  low, high = finite.min(), min(finite.max(), 12 * finite.min())
  broken: dict[float, int] = {}
  for key in [m for m in means if m not in front] + [m for m in means if m in front]:
    table, look = means[key], style.method(key)
    inside = table[table["mean"] <= high]
    if key not in front:
      panel.plot(inside.index, inside["mean"], color=style.MUTED, linewidth=0.6, zorder=1)
      continue
    if key in _banded(front):
      panel.fill_between(
        inside.index,
        inside["min"],
        inside["max"].clip(upper=high * 2),
        color=look.color,
        alpha=0.15,
        linewidth=0,
      )
    panel.plot(
      inside.index,
      inside["mean"],
      color=look.color,
      linestyle=look.line,
      marker=look.marker,
      markersize=4.5,
      zorder=3,
    )
    for rate in table.index.difference(inside.index):
      place = broken[rate] = broken.get(rate, -1) + 1  # side by side, not on top of each other
      panel.plot(
        rate * 10 ** (-0.09 * place),
        0.97,
        "^",
        color=look.color,
        markersize=5,
        clip_on=False,
        transform=panel.get_xaxis_transform(),
      )
    rate = chosen.get(key, np.nan)
    if rate in inside.index:
      panel.plot(
        rate,
        inside.loc[rate, "mean"],
        "o",
        color=look.color,
        markersize=9,
        fillstyle="none",
        markeredgewidth=1,
        zorder=4,
      )
  if "lora" in means:
    panel.axhline(
      means["lora"]["mean"].min(), color=style.method("lora").color, linestyle=":", linewidth=0.8
    )
  panels.log_axis(panel.yaxis, low, high, pad=0.1)
  rates = here["learning_rate"]
  panels.log_axis(panel.xaxis, rates.min(), rates.max())
  panel.grid(True)


def _of(table: pd.DataFrame, setting) -> pd.Series:
  return (table[inputs.SETTING] == list(setting)).all(axis=1)
