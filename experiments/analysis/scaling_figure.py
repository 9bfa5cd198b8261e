"""The figure of the scaling study: extra FLOPs and memory over the number of atoms."""

import pandas as pd
from matplotlib import figure

from experiments.report import panels, style

_RANKS = {8: ("#56b4e9", "o"), 16: ("#0072b2", "s"), 64: ("#d55e00", "^")}
_KEPT = {"k = 2": ":", "k = 4": "-", "k = 8": "--", "k = M": "-."}
_PANELS = {
  "extra_flops_percent": "extra FLOPs",
  "extra_hbm_percent": "extra HBM a chip",
}


def draw(table: pd.DataFrame, compiled: pd.DataFrame) -> figure.Figure:
  """Costs in per cent of LoRA of the same rank: a column per size, a row per cost.

  Args:
    table: analytic rows of all points.
    compiled: [scale, atoms, kept, rank, extra_hbm_percent] of compiled points; may be empty.
  """
  scales = list(dict.fromkeys(table["scale"]))
  drawing = figure.Figure(figsize=(7.4, 4.8), layout="constrained")
  axes = drawing.subplots(len(_PANELS), len(scales), sharex=True, sharey="row", squeeze=False)
  for row, (column, label) in enumerate(_PANELS.items()):
    for place, scale in enumerate(scales):
      _panel(axes[row, place], table[table["scale"] == scale], column)
      if column == "extra_hbm_percent":
        _points(axes[row, place], compiled[compiled["scale"] == scale])
      if not row:
        axes[row, place].set_title(scale)
    axes[row, 0].set_ylabel(label)
  for axis in axes[-1]:
    axis.set_xlabel("atoms M")
  drawing.legend(handles=_handles(len(compiled) > 0), loc="outside right center")
  return drawing


def _panel(axis, table: pd.DataFrame, column: str) -> None:
  for rank, (color, marker) in _RANKS.items():
    for kept, line in _KEPT.items():
      dense = kept == "k = M"
      chosen = (table["rank"] == rank) & (table["dense"] == dense)
      if not dense:
        chosen &= table["kept"] == int(kept.removeprefix("k = "))
      line_rows = table[chosen].sort_values("atoms")
      x, y = line_rows["atoms"], line_rows[column]
      axis.plot(x, y, line, color=color, marker=marker, markersize=3)
  axis.axhline(1.0, color=style.INK, linewidth=0.8)
  axis.set_xscale("log", base=4)
  axis.set_yscale("log")
  axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
  axis.set_xticks(sorted(set(table["atoms"])), [str(m) for m in sorted(set(table["atoms"]))])
  axis.minorticks_off()
  axis.grid(axis="y")


def _points(axis, compiled: pd.DataFrame) -> None:
  for point in compiled.itertuples():
    if point.extra_hbm_percent > 0:
      color, marker = _RANKS[point.rank]
      axis.plot(
        point.atoms,
        point.extra_hbm_percent,
        marker,
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=color,
        markeredgewidth=1.6,
      )


def _handles(compiled: bool) -> list:
  handles = [
    panels.mark(f"R = {rank}", color=color, marker=marker, linestyle="-")
    for rank, (color, marker) in _RANKS.items()
  ]
  handles += [panels.mark(kept, color=style.INK, linestyle=line) for kept, line in _KEPT.items()]
  ring = {"color": style.INK, "marker": "o", "markersize": 9, "markerfacecolor": "none"}
  return [*handles, panels.mark("compiled", **ring)] if compiled else handles
