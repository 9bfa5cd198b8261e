"""The record of a study, its claims, and the registry of the studies in `experiments/studies`."""

import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Mapping

from matplotlib import figure as mfigure

from experiments import committed, comparisons, routing_gain, studies
from qlora_jax import errors


@dataclasses.dataclass(frozen=True)
class Claim:
  """A sentence, its verdict and the evidence, worded from the results.

  Attributes:
    claim: the sentence.
    verdict: by the claim's rule, from the intervals.
    evidence: the numbers.
    routing: of a claim about routing the arm, "STUDY [TASK] ARM", whose measured gain it needs.
  """

  claim: str
  verdict: str
  evidence: str
  routing: str | None = None

  def cells(self, results: committed.Results | None = None) -> list[str]:
    """Claim, verdict and evidence. A verdict on routing needs a measured gain above zero.

    Args:
      results: read instead of the committed ones of the same name.
    """
    if self.routing is None:
      return [self.claim, self.verdict, self.evidence]
    verdict = routing_gain.verdict(self.routing, self.verdict, results)
    evidence = self.evidence + routing_gain.in_words(self.routing, results)
    allowed = routing_gain.allowed(self.routing, results)
    marker = f" <!-- routing: {self.routing} -->" if allowed else ""
    return [self.claim + marker, verdict, evidence]


@dataclasses.dataclass(frozen=True)
class Work:
  """One call of a study that trains without `launch.py --sweep`.

  Attributes:
    workdir: keeps what has been trained; the next call continues there.
    config: file, with :variant.
    limit: of the units of work that this call makes; None for all.
    results: folder that the tables are written to.
    command: of the user.
  """

  workdir: pathlib.Path
  config: str
  limit: int | None
  results: pathlib.Path
  command: str


Table = Callable[[committed.Results], str]  # gives Markdown


@dataclasses.dataclass(frozen=True)
class Study:
  """A study: one question, the config that answers it, and what is made from its results.

  Attributes:
    name: of its command, its figure and its notebook.
    question: one sentence; the title of its notebook.
    about: the notebook's introduction.
    config: file in `configs`, with :variant; empty if it has none.
    results: folder in `experiments/results`.
    claims: gives the claims, each with its rule.
    tables: name in the documents to the function that gives the table.
    caption: of the figure, with units.
    draw: draws the figure; None while there is too little to draw.
    summarise: writes the tables that are derived from the runs into the folder; returns Markdown.
    train: trains what is missing; of a study that `launch.py --sweep` does not train.
    keep_curves: whether `--from` copies curves and example answers as well.
    report_figures: further figure in docs/figures to its name in the report, and its caption.
    position: in lists of studies.
  """

  name: str
  question: str
  about: str
  config: str
  results: str
  claims: Callable[[committed.Results], list[Claim]]
  tables: Mapping[str, Table]
  caption: str = ""
  draw: Callable[[committed.Results], mfigure.Figure | None] | None = None
  summarise: Callable[[committed.Results], str] | None = None
  train: Callable[[Work], None] | None = None
  keep_curves: bool = False
  report_figures: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  position: int = 100

  @property
  def title(self) -> str:
    """The name in words."""
    return self.name.replace("_", " ")

  @property
  def committed_results(self) -> committed.Results:
    return committed.results(self.results)

  @property
  def command(self) -> str:
    """The command that makes the results."""
    workdir = f"--workdir=runs/{self.results.replace('_', '-')}"
    if self.train is not None:
      return f"python -m experiments {self.name} {workdir}"
    return f"python launch.py --config={self.config} {workdir} --sweep"

  def tables_text(self, results: committed.Results) -> str:
    """All tables in Markdown, each below its name."""
    return "\n".join(f"### {name}\n\n{table(results)}" for name, table in self.tables.items())

  def claims_table(self, results: committed.Results) -> str:
    """The claims in Markdown."""
    rows = [claim.cells(results) for claim in self.claims(results)]
    return comparisons.markdown(["claim", "verdict", "evidence"], rows)


_registered: dict[str, Study] = {}


def register(record: Study) -> Study:
  """Adds a study that is declared outside `experiments/studies`.

  Raises:
    errors.UserError: another study has this name.
  """
  if record.name in registry():
    raise errors.UserError(f"study {record.name}: there is one of this name")
  _registered[record.name] = record
  return record


def registry() -> dict[str, Study]:
  """All studies by name: the `STUDY` of each module in `experiments/studies`, and registered."""
  names = [module.name for module in pkgutil.iter_modules(studies.__path__)]
  modules = [importlib.import_module(f"experiments.studies.{name}") for name in names]
  records = sorted((module.STUDY for module in modules), key=lambda record: record.position)
  return {record.name: record for record in records} | _registered


def load(name: str) -> Study:
  """The study of a name.

  Raises:
    errors.UserError: there is none.
  """
  records = registry()
  if name not in records:
    raise errors.UserError(f"study {name!r} is unknown; use one of {', '.join(records)}")
  return records[name]
