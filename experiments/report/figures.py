"""Draws every figure that the data allow and saves each as PNG and SVG."""

import pathlib

import pandas as pd

from experiments.report import inputs, panels, plot_error, plot_routing, plot_training, style

PLOTS = (
  plot_error.forest,
  plot_error.noise,
  plot_routing.routing,
  plot_error.parameters,
  plot_training.curves,
  plot_training.learning_rates,
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
  for plot in PLOTS:
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
