"""The routing map: how much weight each block gives each atom, target by target."""

import math
import textwrap

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
  methods = {task: _method(task, rows["arm"]) for task, rows in data.groupby("task")}
  data = data[data["arm"] == data["task"].map(methods)]
  targets = _targets(data)
  shown = targets[:_MOST_TARGETS]
  both = [given for given in (True, False) if (data["with_instruction"] == given).any()]
  strips = math.ceil(len(shown) / _COLUMNS)
  columns = math.ceil(len(shown) / strips)
  figure = matplotlib.figure.Figure(
    figsize=(max(4.4, panels.WIDTH * columns / _COLUMNS), 1.75 * strips * len(both) + 0.5),
    layout="constrained",
  )
  grid = figure.subplots(strips * len(both), columns, squeeze=False)
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
        table.columns,
        table.index,
        table.to_numpy(),
        vmin=0,
        vmax=most,
        cmap="Blues",
        shading="nearest",
        edgecolors="face",
        linewidth=0.1,
      )
      axes.spines[:].set_visible(False)
      axes.tick_params(length=0)
      axes.set_yticks(_few(table.index))
      axes.set_xticks(_few(table.columns))
      if row == 0:
        axes.set_title(_name(*target, targets))
      elif (moved := _moved(cells[(*target, True)], table)) is not None:
        axes.set_title(f"{100 * moved:.0f} % moved", fontweight="normal", fontsize=7.5)
      if column == 0:
        axes.set_ylabel(("with" if given else "without") + " instruction\nblock", fontsize=7.5)
      axes.tick_params(labelbottom=row == len(both) - 1, labelleft=column == 0)
      if row == len(both) - 1 and index + columns >= len(shown):
        axes.set_xlabel("atom")
      axes.invert_yaxis()
  figure.colorbar(mesh, ax=grid, label="mean weight", shrink=0.7, aspect=30, pad=0.015)
  left_out = len(targets) - len(shown)
  return panels.Drawn(
    "routing",
    "Which atoms are used",
    "Mean weight of each atom (column) in each block (row) over the test inputs, with the "
    "instruction given and with it withheld, on one colour scale. Targets with different maps use "
    "different atoms; equal maps above and below mean that the instruction does not steer the "
    "routing. The share above a lower map is how much of the weight the instruction moves to other "
    f"atoms. {_whose(methods, shown)}"
    + (f" {left_out} more targets are left out." if left_out else ""),
    figure,
  )


def statistics(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """What each final run's router did, run by run: one panel a measurement."""
  final = study.stage("final")
  columns = [c for c in inputs.ROUTER_COLUMNS if np.isfinite(final[c]).any()]
  if not columns:
    return "Routing statistics: no final run has a router."
  del summary
  routed = final[np.isfinite(final[columns]).any(axis=1)]
  methods = style.ordered(routed["arm"])
  figure, axes = panels.grid(len(columns), height=0.9 + 0.26 * len(methods), sharey=True)
  for panel, column in zip(axes, columns, strict=True):
    for place, key in enumerate(methods):
      values, look = routed.loc[routed["arm"] == key, column].dropna(), style.method(key)
      panel.plot(values, [place] * len(values), "o", color=look.color, markersize=4, alpha=0.7)
      panel.plot(values.mean(), place, "|", color=style.INK, markersize=12)
    panel.set_title(inputs.ROUTER_COLUMNS[column])
    panel.set_xlim(left=0)
    panel.margins(x=0.08)
    panel.grid(axis="x")
    panel.tick_params(axis="y", length=0)
  axes[0].set_yticks(range(len(methods)), [style.method(m).label for m in methods])
  axes[0].set_ylim(len(methods) - 0.5, -0.5)
  return panels.Drawn(
    "routers",
    "How the routers spread their weight",
    "A point is a final run, the mean over blocks and the tokens of validation answers; a stroke "
    "is the mean over runs. One atom in use means that the router has collapsed; as many as there "
    "are atoms, that it mixes them alike for every token.",
    figure,
  )


def gain(study: inputs.Study, summary: pd.DataFrame) -> panels.Drawn | str:
  """What the routing gains over training: one panel per setting, one line per method."""
  absent = "Routing gain: the study has no curve of it."
  column = "routing/gain_uniform"
  if study.curves is None or column not in study.curves:
    return absent
  final = study.stage("final")[["trial_id", *inputs.SETTING, "arm"]]
  data = study.curves[["trial_id", "step", column]].dropna().merge(final, on="trial_id")
  shown = [s for s in study.shown_settings() if (data[inputs.SETTING] == list(s)).all(axis=1).any()]
  if not shown:
    return absent
  del summary
  figure, axes = panels.grid(len(shown), height=2.5)
  methods = style.ordered(data["arm"].unique())
  for panel, setting in zip(axes, shown, strict=True):
    here = data[(data[inputs.SETTING] == list(setting)).all(axis=1)]
    panel.axhline(0, color=style.MUTED, linewidth=0.8, zorder=1)
    for method in methods:
      steps = here[here["arm"] == method].groupby("step")[column]
      if not len(steps):
        continue
      mean, look = steps.mean(), style.method(method)
      panel.fill_between(
        mean.index, steps.min(), steps.max(), color=look.color, alpha=0.15, linewidth=0
      )
      panel.plot(mean.index, mean, color=look.color, linestyle=look.line, marker=look.marker)
    panel.set_title(study.setting_label(setting))
    panel.set_xlim(left=0)
    panel.grid(True)
  of = study.measure
  panels.label_outer(axes, "training step", f"gain over equal weights ({of.loss_unit})")
  panels.legend(figure, [panels.handle(method) for method in methods])
  return panels.Drawn(
    "routing_gain",
    "What the routing gains during training",
    f"The {of.loss_noun} on validation rows with equal weights on all atoms instead of the trained "
    "ones, less that as trained: the mean over seeds, with a band from the least to the greatest. "
    "At zero the trained weights do nothing that equal ones would not.",
    figure,
  )


def _method(task: str, present: pd.Series) -> str:
  """The method whose maps are drawn: the one that the report is about, if it has any."""
  return style.subject(task, present) or style.ordered(present)[0]


def _whose(methods: dict[str, str], shown: list[tuple[str, str]]) -> str:
  """Says which method's maps these are."""
  tasks: dict[str, list[str]] = {}
  for task in dict.fromkeys(task for task, _ in shown):
    tasks.setdefault(style.method(methods[task]).label, []).append(task.replace("_", " "))
  if len(tasks) == 1:
    return f"The method is {next(iter(tasks))}."
  return f"The method is {'; '.join(f'{m} on {_list(names)}' for m, names in tasks.items())}."


def _list(names: list[str]) -> str:
  return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def _targets(data: pd.DataFrame) -> list[tuple[str, str]]:
  """(task, target) pairs, those of the tasks with most targets first."""
  pairs = data[["task", "target"]].drop_duplicates()
  size = pairs.groupby("task")["target"].transform("size")
  pairs = pairs.assign(size=-size).sort_values(["size", "task", "target"])
  return list(pairs[["task", "target"]].itertuples(index=False, name=None))


def _name(task: str, target: str, targets: list[tuple[str, str]]) -> str:
  """The target's name under the task's, where there is more than one of either."""
  parts = [task] if len({t for t, _ in targets}) > 1 else []
  parts += [target] if sum(t == task for t, _ in targets) > 1 or not parts else []
  lines = [line for part in parts for line in textwrap.wrap(part.replace("_", " "), 19)]
  return "\n".join(lines)


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
