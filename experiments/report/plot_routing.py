"""The routing map: how much weight each block gives each atom, target by target."""

import math

import matplotlib.figure
import numpy as np
import pandas as pd

from experiments.report import inputs, panels, style

_MOST_TARGETS = 12
_COLUMNS = 6


def routing(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """Heat maps of atoms by blocks, with the instruction above and without it below."""
  del summary
  data = study.routing
  if data is None:
    return "Routing map: the study has no routing.parquet."
  data = data[np.isfinite(data["weight"])].astype({"with_instruction": bool})
  if data.empty:
    return "Routing map: routing.parquet has no finite weight."
  methods = style.ordered(data["method"])
  method = style.ROUTED_REFERENCE
  method = method if method in methods else next(
    (m for m in methods if m.startswith(method)), methods[0]
  )  # fmt: skip
  data = data[data["method"] == method]
  targets = _targets(data)
  shown = targets[:_MOST_TARGETS]
  both = [given for given in (True, False) if (data["with_instruction"] == given).any()]
  strips = math.ceil(len(shown) / _COLUMNS)
  columns = math.ceil(len(shown) / strips)
  figure = matplotlib.figure.Figure(
    figsize=(max(4.4, panels.WIDTH * columns / _COLUMNS), 1.75 * strips * len(both) + 0.5),
    layout="constrained",
  )
  grid = figure.subplots(strips * len(both), columns, squeeze=False, sharex=True, sharey=True)
  for axes in grid.flat:
    axes.set_visible(False)
  cells = {key: _cells(data, *key) for target in shown for key in [(*target, g) for g in both]}
  most = max(np.nanmax(table.to_numpy()) for table in cells.values() if table.size)
  mesh = None
  for index, target in enumerate(shown):
    strip, column = divmod(index, columns)
    for row, given in enumerate(both):
      table = cells[(*target, given)]
      if not table.size:
        continue
      axes = grid[strip * len(both) + row, column]
      axes.set_visible(True)
      mesh = axes.pcolormesh(
        table.columns, table.index, table.to_numpy(), vmin=0, vmax=most, cmap="Blues",
        shading="nearest", edgecolors="face", linewidth=0.1,
      )  # fmt: skip
      axes.spines[:].set_visible(False)
      axes.tick_params(length=0)
      axes.set_yticks(_few(table.index))
      axes.set_xticks(_few(table.columns))
      if row == 0:
        axes.set_title(_name(*target, targets).replace("_", " "))
      elif (moved := _moved(cells[(*target, True)], table)) is not None:
        axes.set_title(f"{100 * moved:.0f} % moved", fontweight="normal", fontsize=7.5)
      if column == 0:
        axes.set_ylabel(("with" if given else "without") + " instruction\nblock", fontsize=7.5)
      if row == len(both) - 1 and index + columns >= len(shown):
        axes.set_xlabel("atom")
        axes.tick_params(axis="x", labelbottom=True)
  if grid[0, 0].get_visible():
    grid[0, 0].invert_yaxis()
  figure.colorbar(mesh, ax=grid, label="mean weight", shrink=0.7, aspect=30, pad=0.015)
  left_out = len(targets) - len(shown)
  return panels.Drawn(
    "routing",
    f"Which atoms are used: {style.method(method).label}",
    "Mean weight of each atom (column) in each block (row) over the test inputs, with the "
    "instruction given and with it withheld, on one colour scale. Targets with different maps use "
    "different atoms; equal maps above and below mean that the instruction does not steer the "
    "routing. The share above a lower map is how much of the weight the instruction moves to other "
    "atoms." + (f" {left_out} more targets are left out." if left_out else ""),
    figure,
  )


def _targets(data: pd.DataFrame) -> list[tuple[str, str]]:
  """(task, target) pairs, those of the tasks with most targets first."""
  pairs = data[["task", "target"]].drop_duplicates()
  size = pairs.groupby("task")["target"].transform("size")
  pairs = pairs.assign(size=-size).sort_values(["size", "task", "target"])
  return list(pairs[["task", "target"]].itertuples(index=False, name=None))


def _name(task: str, target: str, targets: list[tuple[str, str]]) -> str:
  """The target's name, with the task's where there are several; the task's alone if it has one."""
  if len({t for t, _ in targets}) == 1:
    return target
  return task if sum(t == task for t, _ in targets) == 1 else f"{task}\n{target}"


def _cells(data: pd.DataFrame, task: str, target: str, given: bool) -> pd.DataFrame:
  """Mean weights, blocks by atoms, over the runs."""
  rows = data[
    (data["task"] == task) & (data["target"] == target) & (data["with_instruction"] == given)
  ]
  return rows.pivot_table(index="block", columns="atom", values="weight", aggfunc="mean")


def _moved(given: pd.DataFrame, withheld: pd.DataFrame) -> float | None:
  """Half the summed absolute difference of the weights, averaged over the blocks."""
  if given.shape != withheld.shape:
    return None
  return float(0.5 * np.abs(given.to_numpy() - withheld.to_numpy()).sum(axis=1).mean())


def _few(labels: pd.Index) -> list:
  return list(labels[:: max(1, math.ceil(len(labels) / 5))])
