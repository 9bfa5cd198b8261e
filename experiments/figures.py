"""Writes the figures and captions of docs/figures from committed results."""

import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence

from experiments import committed, study
from experiments.report import figures as report_figures
from experiments.report import style
from qlora_jax import errors

HEAD = "# Figures\n\nMade by `make figures` from committed results, each as SVG and PNG.\n"
_FOLDER = "QLORA_JAX_FIGURES"  # replaces docs/figures, for a preview or a test


def folder() -> pathlib.Path:
  """The folder of the figures."""
  path = pathlib.Path(os.environ.get(_FOLDER) or committed.ROOT / "docs" / "figures")
  path.mkdir(parents=True, exist_ok=True)
  return path


def draw(record: study.Study, results: committed.Results, target: pathlib.Path) -> None:
  """Writes a study's figure as `target`.svg and .png; nothing while there is too little to draw."""
  if record.draw is None:
    return
  with style.context():
    drawing = record.draw(results)
    if drawing is None:
      return
    target.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(target.with_suffix(".svg"))
    drawing.savefig(target.with_suffix(".png"), dpi=200)
  strip_date(target.with_suffix(".svg"))


def caption(record: study.Study) -> str:
  """The study's caption, with the commands that make its results and its figure."""
  return _with_commands(record, record.caption, record.name)


def captions() -> dict[str, str]:
  """All figures and their captions: one per study, then those of the reports."""
  records = [record for record in study.registry().values() if record.draw]
  texts = {record.name: caption(record) for record in records}
  for record in records:
    for name, (_, text) in record.report_figures.items():
      texts[name] = _with_commands(record, text, name)
  return texts


def _with_commands(record: study.Study, text: str, name: str) -> str:
  return f"{text} Results: `{record.command}`. Figure: `python -m experiments figures {name}`."


def write(names: Sequence[str] = ()) -> Iterator[pathlib.Path]:
  """Draws the named figures again; yields the path of each.

  Args:
    names: all figures whose results are committed if empty.

  Raises:
    errors.UserError: an unknown name, or a figure without committed results.
  """
  records = {name: record for name, record in study.registry().items() if record.draw}
  unknown = set(names) - set(captions())
  if unknown:
    known = ", ".join(captions())
    raise errors.UserError(f"figure {min(unknown)!r} is unknown; use one of {known}")
  for name, record in records.items():
    wanted = [own for own in (name, *record.report_figures) if own in names or not names]
    if wanted and not record.committed_results.exists:
      if names:
        raise errors.UserError(
          f"figure {wanted[0]}: experiments/results/{record.results} has no results"
        )
      continue
    if name in wanted:
      draw(record, record.committed_results, folder() / name)
      yield folder() / f"{name}.png"
    yield from _from_report(record, [own for own in wanted if own != name])


def _from_report(record: study.Study, names: list[str]) -> Iterator[pathlib.Path]:
  """Copies figures of the report of a study."""
  if not names:
    return
  results = record.committed_results
  with tempfile.TemporaryDirectory() as temporary:
    drawn = pathlib.Path(temporary)
    report_figures.draw(results.study, results.summary, drawn)
    for name in names:
      target = folder() / name
      source = drawn / record.report_figures[name][0]
      for suffix in (".svg", ".png"):
        target.with_suffix(suffix).write_bytes(source.with_suffix(suffix).read_bytes())
      strip_date(target.with_suffix(".svg"))
      yield target.with_suffix(".png")


def write_index(target: pathlib.Path) -> None:
  """Writes README.md with the captions of the figures in `target`."""
  parts = [HEAD]
  for name, text in captions().items():
    if (target / f"{name}.png").is_file():
      parts.append(f"\n## {name.replace('_', ' ')}\n\n![{name}]({name}.png)\n\n{text}\n")
  (target / "README.md").write_text("".join(parts), encoding="utf-8")


def strip_date(path: pathlib.Path) -> None:
  """Strips the date from an SVG, so that drawing again gives the same bytes."""
  text = path.read_text(encoding="utf-8")
  text = re.sub(r"\n *<dc:date>.*?</dc:date>", "", text)
  path.write_text(re.sub(r"[ \t]+\n", "\n", text), encoding="utf-8")
