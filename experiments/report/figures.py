"""Draws every figure that the data allow and saves each as PNG and SVG."""

import pathlib

import pandas as pd

from experiments.report import (
  inputs,
  measure,
  panels,
  plot_accuracy,
  plot_error,
  plot_routing,
  plot_training,
  style,
)

_TRAINING = (plot_training.curves, plot_training.learning_rates)
_REGRESSION = (
  plot_error.forest,
  plot_error.noise,
  plot_routing.routing,
  plot_error.parameters,
  *_TRAINING,
  plot_routing.gain,
)
_LANGUAGE = (
  plot_accuracy.splits,
  plot_accuracy.tasks,
  plot_error.forest,
  *_TRAINING,
  plot_routing.statistics,
  plot_routing.gain,
)
DPI = 200


def draw(
  study: inputs.Study, summary: pd.DataFrame, directory: pathlib.Path
) -> tuple[list[panels.Drawn], list[str]]:
  """Saves the figures as `<directory>/<name>.png` and `.svg`.

  Returns the figures, and one line for each that was left out because its data is absent.
  """
  directory.mkdir(parents=True, exist_ok=True)
  drawn, absent = [], []
  for plot in _REGRESSION if study.measure is measure.MSE else _LANGUAGE:
    with style.context():
      result = plot(study, summary)
      if isinstance(result, str):
        absent.append(result)
        continue
      drawn.append(result)
      result.figure.savefig(directory / f"{result.name}.png", dpi=DPI)
      result.figure.set_layout_engine("none")  # keep the layout just found: it is the slow part
      metadata = {"Date": None, "Creator": None}
      result.figure.savefig(directory / f"{result.name}.svg", metadata=metadata)
  return drawn, absent
