"""The figure of the factorial: the error of every cell, and the effects and interactions."""

import numpy as np
import pandas as pd
from matplotlib import figure

from experiments.analysis import factorial
from experiments.report import panels, style

# Colour and marker stand for the routing; a filled, hollow or half filled marker for the truth.
_ROUTING = {
  "on": ("#d55e00", "o", "routing on"),
  "static": ("#cc79a7", "s", "static mixture"),
  "uniform": ("#0072b2", "^", "uniform on the top 4"),
  "example": ("#009e73", "v", "on, by example"),
  "lora": (style.INK, "D", "LoRA"),
}
_PLACES = {
  "none": "none",
  "input": "in the\ninput",
  "query": "in the\nquery",
  "prior": "prior in\nthe logits",
  "kl": "KL\npenalty",
  "prior+query": "prior\n+ query",
}
_TRUTHS = {
  "true": "wordings seen in training",
  "unseen": "unseen wordings",
  "shuffled": "other rows' wordings",
}

# The drawn effects in order, with their markers.
FAMILIES = {
  "instruction": "o",
  "with routing on": "o",
  "routing": "s",
  "example": "v",
  "against LoRA": "^",
  "interaction": "D",
}
_FILL = {"true": "none", "unseen": "full", "shuffled": "left"}


def draw(cells: pd.DataFrame, effects: pd.DataFrame, domain: factorial.Domain) -> figure.Figure:
  """All cells, and the effects at unseen wordings."""
  drawing = figure.Figure(figsize=(9.6, 4.6), layout="constrained")
  left, right = drawing.subplots(1, 2, width_ratios=(1.45, 1))
  _cells(left, cells, domain)
  _effects(right, effects, domain)
  drawing.legend(handles=_handles(cells), loc="outside lower center", ncols=4)
  return drawing


def _cells(axis, cells: pd.DataFrame, domain: factorial.Domain) -> None:
  routings = [name for name in _ROUTING if name in set(cells["routing"])]
  places = [name for name in _PLACES if name in set(cells["instruction"])]
  slots = [(routing, truth) for routing in routings for truth in _TRUTHS]
  for row in cells.itertuples():
    truth = "unseen" if row.truth == "absent" else row.truth
    place = places.index(row.instruction)
    offset = (slots.index((row.routing, truth)) + 0.5) / len(slots) - 0.5
    color, marker, _ = _ROUTING[row.routing]
    axis.errorbar(
      place + 0.84 * offset,
      row.error,
      yerr=[[row.error - row.error_low], [row.error_high - row.error]],
      color=color,
      marker=marker,
      markersize=4.5,
      elinewidth=1,
      linestyle="none",
      markeredgewidth=1,
      fillstyle=_FILL[truth],
      markerfacecoloralt=style.PAPER,
    )
  for place in range(1, len(places)):
    axis.axvline(place - 0.5, color=style.FAINT, linewidth=0.6)
  named = [_PLACES[name].replace("input", domain.place) for name in places]
  axis.set_xticks(range(len(places)), named)
  axis.set_xlim(-0.5, len(places) - 0.5)
  axis.set_ylim(bottom=0)
  axis.set_ylabel(domain.unit)
  axis.set_title("Error by the instruction's place and routing")
  axis.grid(axis="y")


def _effects(axis, effects: pd.DataFrame, domain: factorial.Domain) -> None:
  families = FAMILIES
  chosen = effects[(effects["truth"] == "unseen") & effects["family"].isin(families)]
  chosen = chosen.iloc[np.argsort(chosen["family"].map(list(families).index), kind="stable")]
  height, ticks, before = 0.0, {}, None
  for row in chosen.itertuples():
    height -= 1.6 if before not in (None, row.family) else 1.0
    before = row.family
    ticks[height] = row.effect
    color = style.INK if row.p_holm < 0.05 else style.MUTED
    marker = FAMILIES[row.family]
    axis.plot([row.percent_low, row.percent_high], [height] * 2, color=color, linewidth=1.4)
    axis.plot(
      row.percent,
      height,
      marker,
      color=color,
      markersize=4.5,
      markerfacecolor=color if row.p_holm < 0.05 else style.PAPER,
    )
  axis.axvline(0, color=style.INK, linewidth=0.6)
  axis.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
  axis.set_xlabel(f"change of {domain.unit.partition(' (')[0]}, %\n(×: of the ratio of two)")
  axis.set_title("Effects, unseen wordings", loc="left")
  axis.grid(axis="x")


def _handles(cells: pd.DataFrame) -> list:
  handles = [
    panels.mark(label, color=color, marker=marker)
    for key, (color, marker, label) in _ROUTING.items()
    if key in set(cells["routing"])
  ]
  look = {"color": style.INK, "marker": "o", "markerfacecoloralt": style.PAPER}
  return handles + [
    panels.mark(label, fillstyle=_FILL[truth], **look)
    for truth, label in _TRUTHS.items()
    if truth in {*cells["truth"], "unseen"}
  ]
