"""The figure: difference to LoRA against the number of training rows, a panel a kind of noise."""

import pathlib

import pandas as pd
from matplotlib import figure
from matplotlib import lines as mlines

from experiments.report import style

# (task, level) -> colour, marker, line.
_LINES = {
  ("regimes", 0.25): ("#0072b2", "o", "-"),
  ("regimes", 0.5): ("#d55e00", "s", "-"),
  ("regimes", 1.0): ("#009e73", "^", "-"),
  ("friedman1", 0.5): (style.INK, "D", "--"),
}


def draw(differences: pd.DataFrame, target: pathlib.Path) -> None:
  """Writes `target`.svg and .png from `analysis.differences`."""
  kinds = list(dict.fromkeys(differences["noise_kind"]))
  with style.context():
    made = figure.Figure(figsize=(9.6, 3.2), layout="constrained")
    panels = made.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(panels, kinds, strict=True):
      _panel(axis, differences[differences["noise_kind"] == kind])
      axis.set_title(kind.replace("_", " "), fontsize=8)
    panels[0].set_ylabel("test MSE against LoRA's, %")
    panels[len(panels) // 2].set_xlabel("training rows")
    made.legend(handles=_handles(differences), loc="outside lower center", ncols=5)
    made.savefig(target.with_suffix(".svg"))
    made.savefig(target.with_suffix(".png"), dpi=200)


def _panel(axis, own: pd.DataFrame) -> None:
  counts = sorted(own["train_rows"].unique())
  groups = [
    (key, part.sort_values("train_rows"))
    for key, part in own.groupby(["task", "noise_level"])
    if key in _LINES
  ]
  groups.sort(key=lambda each: list(_LINES).index(each[0]))
  for place, (key, part) in enumerate(groups):
    color, marker, line = _LINES[key]
    shift = 1.0 + 0.07 * (place - (len(groups) - 1) / 2)  # on a logarithmic axis
    x = part["train_rows"] * shift
    axis.errorbar(
      x,
      part["percent"],
      yerr=[part["percent"] - part["percent_low"], part["percent_high"] - part["percent"]],
      color=color,
      linestyle=line,
      elinewidth=1,
      linewidth=1,
    )
    for value, row in zip(x, part.itertuples(), strict=True):
      axis.plot(
        value,
        row.percent,
        marker,
        color=color,
        markersize=4.5,
        markerfacecolor=style.PAPER if row.verdict == "not significant" else color,
      )
  axis.axhline(0, color=style.INK, linewidth=0.6)
  axis.set_xscale("log")
  axis.set_xticks(counts, [f"{count:,}" for count in counts])
  axis.minorticks_off()
  axis.grid(axis="y")


def _handles(differences: pd.DataFrame) -> list[mlines.Line2D]:
  there = set(zip(differences["task"], differences["noise_level"], strict=True))
  found = [
    mlines.Line2D(
      [], [], color=color, marker=marker, linestyle=line, label=f"{task}, noise {level:g}"
    )
    for (task, level), (color, marker, line) in _LINES.items()
    if (task, level) in there
  ]
  found.append(
    mlines.Line2D(
      [],
      [],
      color=style.MUTED,
      marker="o",
      linestyle="none",
      markerfacecolor=style.PAPER,
      label="hollow: not significant (Holm)",
    )
  )
  return found
