"""Cells, effects and interactions of the factorial, each with a paired bootstrap interval.

A cell is (instruction, routing, truth). The truths:

  true: trained with true wordings, and tested with wordings that training has seen
  unseen: the same runs, tested with other wordings of the same instructions
  shuffled: trained and tested with the wordings of other rows
  absent: nothing reads an instruction

With fewer than six seeds intervals and p-values are Student's.
"""

import dataclasses
from collections.abc import Container

import numpy as np
import pandas as pd

from experiments import comparisons
from qlora_jax.studies import statistics


@dataclasses.dataclass(frozen=True)
class Domain:
  """The kind of task of a factorial.

  Attributes:
    name: folder of its results.
    known, unseen: columns of the test score, smaller is better, at wordings that training has seen
      and at other wordings.
    unit: of the score.
    place: of the instruction where the adapted network reads it.
    accuracy: column of the exact match at unseen wordings, or None.
  """

  name: str
  known: str
  unseen: str
  unit: str
  place: str = "input"
  accuracy: str | None = None


DOMAINS = {
  "regression": Domain(
    "factorial",
    "test_known_mse",
    "test_mse",
    "test MSE (source variance = 1)",
  ),
  "language": Domain(
    "factorial_language",
    "test_seen_nats",
    "test_nats",
    "test nats an answer token",
    "prompt",
    "test_accuracy",
  ),
}
INSTRUCTIONS = ("none", "input", "query", "prior", "kl", "prior+query")
ROUTINGS = ("on", "static", "uniform", "example", "lora")
TRUTHS = ("true", "unseen", "shuffled")
PAIRED = ("on", "uniform")  # the routings for which every way to give the instruction exists


def errors_of_cells(rows: pd.DataFrame, domain: Domain) -> dict[tuple[str, str, str], np.ndarray]:
  """Test error [seeds] of every cell that has been trained, seeds in one order.

  A cell without an instruction stands for each truth, since the truth cannot change it.
  """
  columns = {"true": domain.known, "unseen": domain.unseen}
  tables = {name: comparisons.scores(rows, column) for name, column in columns.items()}
  errors = {}
  for method in tables["unseen"]:
    instruction, routing, trained = method.split("/")
    for truth in TRUTHS:
      if trained == "absent" or (trained == "shuffled") == (truth == "shuffled"):
        table = tables["true" if truth == "true" else "unseen"]
        errors[instruction, routing, truth] = table[method].to_numpy()
  return errors


def cells(rows: pd.DataFrame, domain: Domain) -> pd.DataFrame:
  """One row per cell: its error, and its difference to the same routing without an instruction."""
  errors, chosen, table = errors_of_cells(rows, domain), comparisons.chosen(rows), []
  for (instruction, routing, truth), values in errors.items():
    absent = instruction == "none"
    if absent and truth != "unseen":
      continue
    trained = "absent" if absent else "shuffled" if truth == "shuffled" else "true"
    choice = chosen.loc[f"{instruction}/{routing}/{trained}"]
    row = {
      "instruction": instruction,
      "routing": routing,
      "truth": "absent" if absent else truth,
      **choice[["rank", "atoms", "trainable_params", "learning_rate", "rate_at_edge"]],
      "seeds": len(values),
      "diverged": choice["diverged"],
      "effective_support": choice["effective_support"],
      **comparisons.columns_of("error", statistics.mean_interval(values)),
    }
    if domain.accuracy and truth != "true":
      accuracy = comparisons.scores(rows, domain.accuracy)
      row["exact_match"] = 100 * accuracy[f"{instruction}/{routing}/{trained}"].mean()
    none, lora = errors.get(("none", routing, truth)), errors.get(("input", "lora", truth))
    for name, other in (("against_untold", none), ("against_lora_input", lora)):
      if other is not None and other is not values:
        row |= comparisons.columns_of(name, _relative(values, other))
    table.append(row)
  orders = {"instruction": INSTRUCTIONS, "routing": ROUTINGS, "truth": ("absent", *TRUTHS)}
  return pd.DataFrame(table).sort_values(
    list(orders), key=lambda column: column.map(orders[column.name].index), ignore_index=True
  )


def contrasts(known: Container[tuple]) -> list[tuple[str, str, str, dict]]:
  """(family, truth, name, {cell: weight}) of every effect whose cells exist."""
  effects = []

  def add(family, truth, name, *terms):
    weights: dict[tuple, float] = {}
    for weight, cell in terms:
      weights[cell] = weights.get(cell, 0.0) + weight
    if all(cell in known for cell in weights):
      effects.append((family, truth, name, weights))

  def mean(weight, these):
    these = list(these)
    return [(weight / len(these), cell) for cell in these]

  def signed(signs, *cells):
    return [(1 if sign == "+" else -1, cell) for sign, cell in zip(signs, cells, strict=True)]

  given = [way for way in INSTRUCTIONS if way != "none"]
  for truth in TRUTHS:

    def at(way, routing, truth=truth):
      return (way, routing, truth)

    for way in given:
      routings = PAIRED if way in ("query", "prior+query") else ROUTINGS[:3]
      with_way = mean(1, (at(way, routing) for routing in routings))
      without = mean(-1, (at("none", routing) for routing in routings))
      add("instruction", truth, f"{way} − none", *with_way, *without)
    ways = ("none", "input", "prior", "kl")  # for which every routing exists
    for other in ROUTINGS[1:3]:
      with_on = mean(1, (at(way, "on") for way in ways))
      without = mean(-1, (at(way, other) for way in ways))
      add("routing", truth, f"on − {other}", *with_on, *without)
    for way in given:
      for other in ROUTINGS[1:3]:
        name = f"({way} − none) × (on − {other})"
        cells = at(way, "on"), at("none", "on"), at(way, other), at("none", other)
        add("interaction", truth, name, *signed("+--+", *cells))
    for way in given:
      cells = at(way, "on"), at("none", "on")
      add("with routing on", truth, f"{way} − none, routing on", *signed("+-", *cells))
    for way in ("none", "input"):
      cells = at(way, "on"), at(way, "lora")
      add("against LoRA", truth, f"on − LoRA, {way}", *signed("+-", *cells))
    for way in ("query", "prior+query"):
      cells = at(way, "on"), at(way, "example")
      add("example", truth, f"on − example, {way}", *signed("+-", *cells))
    for routing in PAIRED:
      cells = (at(way, routing) for way in ("prior+query", "prior", "query", "none"))
      add("interaction", truth, f"prior × query, routing {routing}", *signed("+--+", *cells))
  for way in given:
    for routing in ROUTINGS[:3]:
      for family, other in (("wording", "true"), ("truth", "shuffled")):
        cells = (way, routing, "unseen"), (way, routing, other)
        add(family, "", f"unseen − {other}, {way}, routing {routing}", *signed("+-", *cells))
  return effects


def effects(rows: pd.DataFrame, domain: Domain) -> pd.DataFrame:
  """One row per effect, in error and in per cent, with Holm's p in its family at one truth.

  Per cent is of the mean logarithm. An interaction in per cent is a ratio of ratios, so that its
  sign on the two scales can differ.
  """
  errors, table = errors_of_cells(rows, domain), []
  for family, truth, name, weights in contrasts(errors):
    values = np.stack([errors[cell] for cell in weights])
    factors = list(weights.values())
    plain, _ = _contrast(values, factors)
    log, p_value = _contrast(np.log(values), factors)
    table.append(
      {
        "family": family,
        "effect": name,
        "truth": truth,
        "seeds": values.shape[1],
        **comparisons.columns_of("error", plain),
        **comparisons.columns_of(
          "percent", statistics.Interval(*comparisons.percent(np.array(log)))
        ),
        "p_value": p_value,
      }
    )
  table = pd.DataFrame(table)
  table["p_holm"] = table.groupby(["family", "truth"])["p_value"].transform(statistics.holm)
  return table


def _contrast(values: np.ndarray, weights: list[float]) -> tuple[statistics.Interval, float]:
  if values.shape[1] < statistics.FEW:
    return statistics.student(weights @ values)
  p_value = statistics.paired_p_value(weights @ values, np.zeros(values.shape[1]))
  return statistics.paired_contrast(values, weights), p_value


def _relative(values: np.ndarray, other: np.ndarray) -> statistics.Interval:
  """Per cent of the other error; of few seeds, from the mean difference of logarithms."""
  if len(values) < statistics.FEW:
    log = statistics.student(np.log(values / other))[0]
    return statistics.Interval(*comparisons.percent(np.array(log)))
  return statistics.paired_bootstrap_relative(values, other)
