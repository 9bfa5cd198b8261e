"""The notebooks: one template for all studies, and what its cells call."""

import json
import pathlib

from experiments import committed, figures, study

FOLDER = committed.ROOT / "notebooks"
_METADATA = {
  "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
  "language_info": {"name": "python"},
}


def cells(record: study.Study) -> list[tuple[str, str]]:
  """The template: type and source of each cell of a study's notebook."""
  return [
    ("markdown", f"# {record.question}\n\n{record.about}"),
    ("code", f'from experiments import notebooks\n\nstudy = notebooks.Shown("{record.name}")'),
    ("markdown", "## Figure"),
    ("code", "study.figure()"),
    ("code", "print(study.caption())"),
    ("markdown", "## Tables"),
    ("code", "study.tables()"),
    ("markdown", "## Claims"),
    ("code", "study.claims()"),
  ]


def text(record: study.Study) -> str:
  """A study's notebook as the file holds it."""
  cell_list = []
  for number, (kind, source) in enumerate(cells(record)):
    cell = {
      "cell_type": kind,
      "id": f"{record.name.replace('_', '-')}-{number}",
      "metadata": {},
      "source": source.splitlines(keepends=True),
    }
    if kind == "code":
      cell |= {"execution_count": None, "outputs": []}
    cell_list.append(cell)
  notebook = {"cells": cell_list, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}
  return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def files() -> dict[pathlib.Path, str]:
  """Path and text of the notebooks of all studies."""
  return {FOLDER / f"{name}.ipynb": text(record) for name, record in study.registry().items()}


class Shown:
  """What a notebook shows of a study."""

  def __init__(self, name: str):
    self.record = study.load(name)

  def figure(self):
    """The figure, drawn again."""
    from IPython import display  # which a notebook has

    target = figures.folder() / self.record.name
    figures.draw(self.record, self.record.committed_results, target)
    return display.Image(filename=str(target.with_suffix(".png")))

  def caption(self) -> str:
    """The caption, with the commands that make the results and the figure."""
    return figures.caption(self.record)

  def tables(self):
    """All tables."""
    from IPython import display

    return display.Markdown(self.record.tables_text(self.record.committed_results))

  def claims(self):
    """The claims with verdict and evidence."""
    from IPython import display

    return display.Markdown(self.record.claims_table(self.record.committed_results))
