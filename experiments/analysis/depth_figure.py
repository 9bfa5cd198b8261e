"""The figure of the depth study: usage, similarity, removal and transfer."""

import numpy as np
import pandas as pd
from matplotlib import figure

from experiments.analysis import depth_tables, depth_training
from experiments.report import style

# Colours and markers of the settings, and short names; Okabe-Ito; markers differ for print in grey.
_SETTINGS = {
  "regimes queryable 4 blocks": ("#0072b2", "o", "regimes, 4 blocks"),
  "multi_target queryable_query 4 blocks": ("#d55e00", "^", "multi target, query, 4 blocks"),
  "multi_target queryable_prior 4 blocks": ("#009e73", "s", "multi target, prior, 4 blocks"),
  "regimes queryable 8 blocks": ("#56b4e9", "D", "regimes, 8 blocks"),
  "multi_target queryable_query 8 blocks": ("#e69f00", "v", "multi target, query, 8 blocks"),
}
_SHOWN = "multi_target queryable_query 4 blocks"  # the setting whose usage is drawn
_ARMS = {
  "all from scratch": ("#24292f", "s"),
  "source memory, all trained": ("#56b4e9", "D"),
  "source memory frozen": ("#0072b2", "o"),
  "random memory frozen": ("#e69f00", "^"),
  "router alone, source memory": ("#0072b2", "P"),
  "router alone, random memory": ("#e69f00", "X"),
}


def draw(tables: depth_tables.Tables, summary: pd.DataFrame) -> figure.Figure:
  """Four panels; those whose runs are missing stay empty."""
  drawing = figure.Figure(figsize=(9.6, 7.6), layout="constrained")
  grid = drawing.subplots(2, 2)
  _usage(drawing, grid[0, 0], tables)
  _similarity(grid[0, 1], summary)
  _removal(grid[1, 0], tables, summary)
  _transfer(grid[1, 1], summary)
  return drawing


def _present(summary: pd.DataFrame, kind: str) -> list[str]:
  present = set(summary[summary["kind"] == kind]["setting"])
  return [setting for setting in _SETTINGS if setting in present]


def _usage(drawing, axis, tables) -> None:
  axis.set_title("a  Weights of one seed")
  settings = list(dict.fromkeys(tables["usage"]["setting"]))
  setting = _SHOWN if _SHOWN in settings else settings[0]
  weights = next(iter(depth_tables.usage(tables, setting, "trained").values()))  # [G, N, M]
  parts, blocks, atoms = weights.shape
  rows = np.swapaxes(weights, 0, 1).reshape(blocks * parts, atoms)  # parts within blocks
  image = axis.imshow(rows, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
  for block in range(1, blocks):
    axis.axhline(block * parts - 0.5, color=style.PAPER, linewidth=1.5)
  middles = (np.arange(blocks) + 0.5) * parts - 0.5
  axis.set_yticks(middles, [f"block {b + 1}" for b in range(blocks)])
  label = _SETTINGS.get(setting, ("", "", setting))[2]
  axis.set_xlabel(f"atom ({label}; a block's rows are the task's {parts} parts)", fontsize=7.5)
  drawing.colorbar(image, ax=axis, label="mean weight", shrink=0.9)


def _similarity(axis, summary) -> None:
  axis.set_title("b  Do two blocks use the same atoms?")
  settings = _present(summary, "similarity")
  for state, marker, shift in (("untrained", "o", 0.15), ("trained", "s", -0.15)):
    filled = state == "trained"
    for place, setting in enumerate(settings):
      row = _pick(summary, "similarity", setting, state, "blocks, cosine, excess")
      color = _SETTINGS[setting][0]
      axis.errorbar(
        row["mean"],
        place + shift,
        xerr=[[row["mean"] - row["low"]], [row["high"] - row["mean"]]],
        fmt=marker,
        color=color,
        markerfacecolor=color if filled else style.PAPER,
        capsize=2,
        label=state if place == 0 else None,
      )
  axis.axvline(0, color=style.INK, linewidth=0.8)
  axis.set_yticks(range(len(settings)), [_SETTINGS[s][2] for s in settings])
  axis.set_ylim(len(settings) - 0.5, -0.5)
  axis.set_xlabel("centred cosine, minus that of renamed atoms\n(mean of 10 seeds, 95 % interval)")
  axis.grid(axis="x")
  axis.legend(loc="best")


def _removal(axis, tables, summary) -> None:
  axis.set_title("c  An atom's use in a block, and its removal there")
  for setting in _present(summary, "removal"):
    color, marker, label = _SETTINGS[setting]
    risen, weights = (
      depth_tables.effects(tables, setting),
      depth_tables.usage(tables, setting, "trained"),
    )
    usage = np.concatenate([weights[seed].mean(axis=0).ravel() for seed in risen])
    rise = np.concatenate([rises[1:].ravel() for rises in risen.values()])
    row = _pick(summary, "removal", setting, "trained", "usage and rise, blocks and atoms")
    label = f"{label}: ρ = {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    axis.plot(
      usage, rise, marker, color=color, markersize=2, alpha=0.35, label=label, rasterized=True
    )
  axis.set_xscale("log")
  axis.set_yscale("symlog", linthresh=1.0)
  axis.set_xlim(left=1e-3)
  for scale in (axis.xaxis, axis.yaxis):
    scale.set_major_formatter(lambda value, _: f"{value:g}")
  axis.set_ylim(top=1e5)  # room for the legend
  axis.set_xlabel("mean weight of the atom in the block")
  axis.set_ylabel("rise of the test error, %")
  axis.grid()
  axis.legend(fontsize=6.5, markerscale=2, loc="upper left", handlelength=1)


def _transfer(axis, summary) -> None:
  axis.set_title("d  A new task: what is taken, what is trained")
  errors = summary[(summary["kind"] == "transfer") & (summary["quantity"] == "test mse")]
  settings = [pair.name for pair in depth_training.PAIRS if pair.name in set(errors["setting"])]
  for shift, (arm, (color, marker)) in zip(
    np.linspace(-0.32, 0.32, len(_ARMS)), _ARMS.items(), strict=True
  ):
    rows = errors[errors["what"] == arm].set_index("setting")
    places = [index for index, setting in enumerate(settings) if setting in rows.index]
    if not places:
      continue
    rows = rows.loc[[settings[place] for place in places]]
    axis.errorbar(
      rows["mean"],
      np.array(places) + shift,
      xerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]],
      fmt=marker,
      color=color,
      capsize=2,
      label=arm,
    )
  labels = [setting.replace("_", " ").replace(" → ", "\n→ ") for setting in settings]
  axis.set_yticks(range(len(settings)), labels)
  axis.set_ylim(max(len(settings), 1) - 0.5, -0.5)
  axis.set_xlabel("test MSE, source variance = 1\n(mean of 10 seeds, 95 % interval)")
  axis.grid(axis="x")
  if settings:
    axis.set_xlim(right=2.0 * errors["high"].max())  # room for the legend
    axis.legend(fontsize=6.5, loc="center right")


def _pick(summary, kind, setting, what, quantity) -> pd.Series:
  chosen = (
    (summary["kind"] == kind)
    & (summary["setting"] == setting)
    & (summary["what"] == what)
    & (summary["quantity"] == quantity)
  )
  return summary[chosen].iloc[0]
