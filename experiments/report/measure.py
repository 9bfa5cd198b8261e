"""What a study measures: the one place where its kinds differ for tables, figures and page.

Noisy regression is judged by its mean squared error; fine-tuning of a language model by the share
of answers that match exactly, or, where its data have no test split, by the likelihood of answers.
"""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number that each final run has beside the one that the report compares.

  Attributes:
    key: its column in `results.parquet` and in the summary; name: what it is called.
    lower: whether less is better; scale: factor from the column to the number shown.
    base: the column of the same number before training, if there is one.
  """

  key: str
  name: str
  lower: bool
  scale: float = 1.0
  base: str = ""


@dataclasses.dataclass(frozen=True)
class Measure(Quantity):
  """The number that a report compares methods by.

  Attributes:
    noun, mean, short: what it is, in a sentence; what a mean of it is of; its abbreviation.
    meaning: its definition; unit: follows a value, with its own space.
    validation, validation_name, validation_noun: column, axis label and sentence's first words of
      what the search minimises; curve, curve_name, curve_noun: of what learning curves show.
    relative: whether differences are in percent of the baseline, or else in the unit itself.
    resolution: the difference that a study should resolve, for `seeds_needed`: a share of the
      baseline's mean if `relative`, or else in the unit itself.
    loss_noun, loss_unit: what the routing gain is measured in, in a sentence and on an axis.
    required: the columns that `results.parquet` must have.
    also: further quantities of the final runs.
  """

  noun: str = ""
  mean: str = ""
  short: str = ""
  meaning: str = ""
  unit: str = ""
  validation: str = ""
  validation_name: str = ""
  validation_noun: str = ""
  curve: str = ""
  curve_name: str = ""
  curve_noun: str = ""
  loss_noun: str = "mean squared error"
  loss_unit: str = "MSE"
  relative: bool = True
  resolution: float = 0.05
  required: tuple[str, ...] = ()
  also: tuple[Quantity, ...] = ()

  @property
  def better(self) -> str:
    return "lower" if self.lower else "higher"

  @property
  def worse(self) -> str:
    return "higher" if self.lower else "lower"

  @property
  def best(self) -> str:
    return "lowest" if self.lower else "highest"

  @property
  def contrast(self) -> str:
    """The summary's column of the difference that figures and verdicts in words show."""
    return "relative" if self.relative else "difference"

  @property
  def contrast_unit(self) -> str:
    if self.relative:
      return "%"
    return "points" if self.scale == 100 else self.unit.strip()


MSE = Measure(
  key="test_mse",
  name="test MSE",
  lower=True,
  base="base_mse",
  noun="test error",
  mean="error",
  short="test MSE",
  meaning="Test error (mean squared error, MSE)",
  validation="validation_mse",
  validation_name="validation MSE",
  validation_noun="Validation error",
  curve="validation_mse",
  curve_name="validation MSE",
  curve_noun="Validation error",
  required=("noise_kind", "noise_level", "validation_mse", "test_mse", "base_mse", "diverged"),
)

NATS = Measure(
  key="validation_nats",
  name="validation nats",
  lower=True,
  noun="negative log-likelihood",
  mean="negative log-likelihood",
  short="negative log-likelihood",
  meaning="Negative log-likelihood of an answer token in nats (mean over the validation split)",
  unit=" nats",
  relative=False,
  loss_noun="nats per answer token",
  loss_unit="nats",
  validation="validation_nats",
  validation_name="validation nats",
  validation_noun="Negative log-likelihood of the validation answers",
  curve="train_loss",
  curve_name="training loss, nats",
  curve_noun="Training loss (nats an answer token)",
  required=("validation_nats",),
)
EXACT_MATCH = dataclasses.replace(
  NATS,
  key="test_accuracy",
  name="exact match, %",
  lower=False,
  scale=100.0,
  base="base_test_accuracy",
  resolution=1.0,
  noun="exact match",
  mean="exact match",
  short="exact match",
  meaning="Exact match in percent (share of greedily generated answers that equal an accepted one, "
  "for inputs that training did not see and instructions in new wordings)",
  unit=" %",
  also=(
    Quantity(
      "test_seen_accuracy",
      "exact match, known wordings, %",
      False,
      100.0,
      "base_test_seen_accuracy",
    ),
    Quantity("validation_nats", "validation nats", True),
  ),
)

# Splits of a language study: column prefix and what it holds.
SPLITS = {"test": "new wordings", "test_seen": "known wordings"}


def of(columns: Iterable[str]) -> Measure:
  """The measure of a table of runs, or of a summary, from the columns that it has."""
  columns = set(columns)
  return next((m for m in (MSE, EXACT_MATCH, NATS) if m.key in columns), MSE)
