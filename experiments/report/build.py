"""Makes a report: reads the study, computes the tables, draws the figures, writes the page."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from experiments.report import figures, html, inputs, tables


def write_report(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str] | None = None,
  baselines: Mapping[str, Sequence[str]] | None = None,
) -> pathlib.Path:
  """Writes tables, figures and `report.html` for the study in `workdir`.

  Args:
    workdir: the directory with `results.parquet` and `study.json`.
    out: where the report goes; `workdir/report` by default.
    baselines: task to the methods its rows are compared with; the empty name stands for every
      task not named. What is not given keeps `tables.BASELINES`.

  Returns:
    The path of `report.html`.

  Raises:
    UserError: an input is missing or damaged.
  """
  study = inputs.read(workdir)
  out = study.workdir / "report" if out is None else pathlib.Path(out)
  summary = tables.summarize(study, baselines)
  out.mkdir(parents=True, exist_ok=True)
  summary.to_csv(out / "summary.csv", index=False)
  summary.to_parquet(out / "summary.parquet", index=False)
  (out / "summary.md").write_text(tables.markdown(summary), encoding="utf-8")
  if len(scores := tables.by_task(study)):
    scores.to_csv(out / "tasks.csv", index=False)
  drawn, absent = figures.draw(study, summary, out / "figures")
  page = out / "report.html"
  page.write_text(html.render(study, summary, drawn, absent, out / "figures"), encoding="utf-8")
  return page
