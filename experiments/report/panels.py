"""What the figures share: a grid of panels, one legend, log axes with readable ticks."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np

from experiments.report import style

WIDTH = 11.0  # inches, of a full row of panels


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A figure with what the report says about it. `caption` tells what to read from it."""

  name: str
  title: str
  caption: str
  figure: matplotlib.figure.Figure


def grid(
  count: int, height: float = 2.5, columns: int = 4, **subplots
) -> tuple[matplotlib.figure.Figure, list]:
  """A figure of `count` panels of `height` inches; returns it and its axes, row by row."""
  columns = _columns(count, columns)
  rows = math.ceil(count / columns)
  width = WIDTH if columns > 2 else (4.4, 7.6)[columns - 1]
  figure = matplotlib.figure.Figure(figsize=(width, height * rows), layout="constrained")
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
  axes = list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)
  for unused in axes[count:]:
    unused.set_visible(False)
  return figure, axes[:count]


def _columns(count: int, most: int) -> int:
  """The number of columns up to `most` that leaves the fewest empty panels; more if equal."""
  if count <= most:
    return count
  choices = range(max(2, most - 1), most + 1)
  return min(choices, key=lambda columns: (-count % columns, -columns))


def label_outer(all_axes: Sequence, xlabel: str, ylabel: str) -> None:
  """Axis labels on the outer panels only: x where nothing is below, y on the left."""
  specs = [axes.get_subplotspec() for axes in all_axes]
  taken = {(spec.rowspan.start, spec.colspan.start) for spec in specs}
  for axes, spec in zip(all_axes, specs, strict=True):
    if (spec.rowspan.start + 1, spec.colspan.start) not in taken:
      axes.set_xlabel(xlabel)
      axes.tick_params(axis="x", labelbottom=True)
    if spec.is_first_col():
      axes.set_ylabel(ylabel)


def mark(label: str, **look) -> matplotlib.lines.Line2D:
  """An entry of a legend: a mark without a line, unless `look` has one."""
  return matplotlib.lines.Line2D([], [], label=label, **({"linestyle": "none"} | look))


def handle(key: str, **override) -> matplotlib.lines.Line2D:
  """The legend entry of a method."""
  look = style.method(key)
  settings = {
    "label": look.label,
    "color": look.color,
    "linestyle": look.line,
    "marker": look.marker,
  }
  return matplotlib.lines.Line2D([], [], **(settings | override))


def legend(figure: matplotlib.figure.Figure, handles: Sequence) -> None:
  """One legend below all panels."""
  width = figure.get_figwidth()
  columns = min(len(handles), max(2, int(width / 2.1)))
  columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))  # even rows
  figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def handles(methods: Sequence[str], front: Sequence[str]) -> list[matplotlib.lines.Line2D]:
  """Entries of the methods in front, and one for all those behind them."""
  rest = [m for m in methods if m not in front]
  return [handle(m) for m in front] + ([background_handle(rest)] if rest else [])


def background_handle(methods: Sequence[str]) -> matplotlib.lines.Line2D:
  return matplotlib.lines.Line2D(
    [], [], color=style.MUTED, linewidth=0.7, label=f"{len(methods)} other methods"
  )


def log_axis(axis, low: float, high: float, pad: float = 0.06) -> None:
  """A log axis from `low` to `high` with 2 to 6 round, written-out tick labels."""
  span = math.log10(high / low) if high > low else 0.0
  margin = max(pad * span, 0.03)
  low, high = low / 10**margin, high * 10**margin
  name = axis.axis_name
  axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
  ticks = _round_numbers(low, high)
  axis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
  axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: short(value)))
  axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _round_numbers(low: float, high: float) -> list[float]:
  """The coarsest round numbers that give at least 3 labels, or failing that the most."""
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  span, best = math.log10(high / low), []
  for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), np.arange(1, 10, 0.5)):
    inside = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    inside = inside[:: math.ceil(len(inside) / 6)] if inside else []
    gaps = [math.log10(b / a) for a, b in itertools.pairwise(inside)]
    crowded = any(gap < 0.12 * span for gap in gaps)
    if len(inside) > len(best) and not (crowded and best):
      best = inside
    if len(best) >= 3:
      break
  return best if len(best) > 1 else [float(f"{v:.2g}") for v in np.geomspace(low, high, 4)[1:3]]


def short(value: float) -> str:
  """A tick label: 0.03, 20, 5k, 2M, 1e-5."""
  if value >= 1e6:
    return f"{value / 1e6:g}M"
  if value >= 1e3:
    return f"{value / 1e3:g}k"
  return f"{value:.3g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def middle_level_note(study, shown: Sequence) -> str:
  """Says which noise levels have panels when not all have."""
  total = len(study.settings())
  if len(shown) == total:
    return ""
  return f" {len(shown)} of {total} data sets are drawn: the middle noise level of each task."


def seeds_text(summary) -> str:
  low, high = int(summary["num_seeds"].min()), int(summary["num_seeds"].max())
  return f"{low} to {high} seeds" if low != high else f"{low} seed{'' if low == 1 else 's'}"
