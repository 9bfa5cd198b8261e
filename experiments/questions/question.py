"""A question of the study: what draws its figure, fills its tables and words its answer."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping

from experiments.questions import committed, routing

_FOLDER = "QLORA_JAX_FIGURES"  # where figures go instead of docs/figures, for a look or a test


@dataclasses.dataclass(frozen=True)
class Claim:
  """A sentence, its verdict and the evidence, worded from the results.

  Attributes:
    claim: the sentence.
    verdict: by its own rule, from the intervals.
    evidence: the numbers.
    routing: of a claim about routing the arm, "STUDY [TASK] ARM", whose measured gain it needs.
  """

  claim: str
  verdict: str
  evidence: str
  routing: str | None = None

  def cells(self) -> list[str]:
    """Claim, verdict and evidence; without a gain above zero no verdict on routing is allowed."""
    if self.routing is None:
      return [self.claim, self.verdict, self.evidence]
    verdict = routing.verdict(self.routing, self.verdict)
    marker = f" <!-- routing: {self.routing} -->" if routing.allowed(self.routing) else ""
    return [self.claim + marker, verdict, self.evidence + routing.told(self.routing)]


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    name: of its figure and its notebook.
    caption: what the figure shows, with units.
    study: folder below `experiments/results` that it reads.
    command: makes these results.
    draw: writes `target`.svg and .png.
    tables: name to a function that gives a table in Markdown; the names that documents use.
    answer: gives its claims.
  """

  name: str
  caption: str
  study: str
  command: str
  draw: Callable[[pathlib.Path], None]
  tables: Mapping[str, Callable[[], str]]
  answer: Callable[[], list[Claim]]

  @property
  def short(self) -> str:
    """Its name in a table."""
    return self.name.replace("_", " ")

  @property
  def ready(self) -> bool:
    """Whether its results are there."""
    return (committed.RESULTS / self.study).is_dir()

  def write(self) -> pathlib.Path:
    """Draws the figure; returns the PNG beside the SVG."""
    target = folder() / self.name
    self.draw(target)
    settle(target.with_suffix(".svg"))
    return target.with_suffix(".png")

  def figure(self):
    """The figure, drawn anew, for a notebook."""
    from IPython import display  # of the notebook that asks

    return display.Image(filename=str(self.write()))

  def table(self, name: str | None = None):
    """A table for a notebook; the first unless named."""
    from IPython import display

    return display.Markdown(self.tables[name or next(iter(self.tables))]())

  def answers(self):
    """The claims with verdict and evidence, for a notebook."""
    from IPython import display

    return display.Markdown(claims(self.answer()))

  def told(self) -> str:
    """The caption with the commands that make the results and the figure."""
    return (
      f"{self.caption} Results: `{self.command}`. Figure: `python -m experiments.questions"
      f" {self.name}`."
    )


def folder() -> pathlib.Path:
  """Where figures go."""
  found = pathlib.Path(os.environ.get(_FOLDER) or committed.ROOT / "docs" / "figures")
  found.mkdir(parents=True, exist_ok=True)
  return found


def claims(rows: list[Claim]) -> str:
  """Claims as a table in Markdown."""
  return committed.markdown(["claim", "verdict", "evidence"], [row.cells() for row in rows])


def settle(path: pathlib.Path) -> None:
  """Takes from an SVG what differs between two drawings of the same: the date."""
  text = path.read_text(encoding="utf-8")
  text = re.sub(r"\n *<dc:date>.*?</dc:date>", "", text)
  path.write_text(re.sub(r"[ \t]+\n", "\n", text), encoding="utf-8")
