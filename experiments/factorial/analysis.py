"""Cells, effects and interactions of the factorial, each with a paired bootstrap interval.

A cell is (instruction, routing, truth). Truth is 'true': trained with true wordings and tested with
wordings that training has seen; 'unseen': the same runs, tested with other wordings of the same
instructions; 'shuffled': trained and tested with the wordings of other rows; 'absent' where nothing
reads an instruction.
"""

import numpy as np
import pandas as pd

from experiments import kept
from qlora_jax.evaluation import statistics

INSTRUCTIONS = ("none", "input", "query", "prior", "kl", "prior+query")
ROUTINGS = ("on", "static", "uniform", "lora")
TRUTHS = ("true", "unseen", "shuffled")
PAIRED = ("on", "uniform")  # the routings that every way to give the instruction exists for


def errors_of_cells(rows: pd.DataFrame) -> dict[tuple[str, str, str], np.ndarray]:
  """Test mean squared error [seeds] of every cell that has been trained, seeds in one order.

  A cell without an instruction is there once for each truth, since the truth cannot change it.
  """
  columns = {"true": "test_known_mse", "unseen": "test_mse"}
  tables = {name: kept.scores(rows, column) for name, column in columns.items()}
  found = {}
  for method in tables["unseen"]:
    instruction, routing, trained = method.split("/")
    for truth in TRUTHS:
      if trained == "absent" or (trained == "shuffled") == (truth == "shuffled"):
        table = tables["true" if truth == "true" else "unseen"]
        found[instruction, routing, truth] = table[method].to_numpy()
  return found


def cells(rows: pd.DataFrame) -> pd.DataFrame:
  """One row a cell: its error, and its difference in per cent to the same routing told nothing."""
  found, chosen, table = errors_of_cells(rows), kept.chosen(rows), []
  for (instruction, routing, truth), values in found.items():
    absent = instruction == "none"
    if absent and truth != "unseen":
      continue
    trained = "absent" if absent else "shuffled" if truth == "shuffled" else "true"
    own = chosen.loc[f"{instruction}/{routing}/{trained}"]
    row = {
      "instruction": instruction, "routing": routing, "truth": "absent" if absent else truth,
      **own[["rank", "atoms", "trainable_params", "learning_rate", "rate_at_edge"]],
      "seeds": len(values), "diverged": own["diverged"],
      "effective_support": own["effective_support"],
      **_ends("mse", statistics.bootstrap_mean(values)),
    }  # fmt: skip
    untold, lora = found.get(("none", routing, truth)), found.get(("input", "lora", truth))
    for name, other in (("against_untold", untold), ("against_lora_input", lora)):
      if other is not None and other is not values:
        row |= _ends(name, statistics.paired_bootstrap_relative(values, other))
    table.append(row)
  orders = {"instruction": INSTRUCTIONS, "routing": ROUTINGS, "truth": ("absent", *TRUTHS)}
  return pd.DataFrame(table).sort_values(
    list(orders), key=lambda column: column.map(orders[column.name].index), ignore_index=True
  )


def contrasts(found: dict) -> list[tuple[str, str, str, dict]]:
  """(family, truth, name, {cell: weight}) of every effect whose cells exist."""
  effects = []

  def add(family, truth, name, *terms):
    weights: dict[tuple, float] = {}
    for weight, cell in terms:
      weights[cell] = weights.get(cell, 0.0) + weight
    if all(cell in found for cell in weights):
      effects.append((family, truth, name, weights))

  def mean(weight, these):
    these = list(these)
    return [(weight / len(these), cell) for cell in these]

  told = [each for each in INSTRUCTIONS if each != "none"]
  for truth in TRUTHS:
    for way in told:
      routings = PAIRED if way in ("query", "prior+query") else ROUTINGS[:3]
      add(
        "instruction", truth, f"{way} − none",
        *mean(1, ((way, r, truth) for r in routings)),
        *mean(-1, (("none", r, truth) for r in routings)),
      )  # fmt: skip
    ways = ("none", "input", "prior", "kl")  # those that every routing exists for
    for other in ROUTINGS[1:3]:
      add(
        "routing", truth, f"on − {other}",
        *mean(1, ((way, "on", truth) for way in ways)),
        *mean(-1, ((way, other, truth) for way in ways)),
      )  # fmt: skip
    for way in told:
      for other in ROUTINGS[1:3]:
        add(
          "interaction", truth, f"({way} − none) × (on − {other})",
          (1, (way, "on", truth)), (-1, ("none", "on", truth)),
          (-1, (way, other, truth)), (1, ("none", other, truth)),
        )  # fmt: skip
    for routing in PAIRED:
      add(
        "interaction", truth, f"prior × query, routing {routing}",
        (1, ("prior+query", routing, truth)), (-1, ("prior", routing, truth)),
        (-1, ("query", routing, truth)), (1, ("none", routing, truth)),
      )  # fmt: skip
  for way in told:
    for routing in ROUTINGS[:3]:
      for family, other in (("wording", "true"), ("truth", "shuffled")):
        name = f"unseen − {other}, {way}, routing {routing}"
        add(family, "", name, (1, (way, routing, "unseen")), (-1, (way, routing, other)))
  return effects


def effects(rows: pd.DataFrame) -> pd.DataFrame:
  """One row an effect: in error, and in per cent (of the logarithm), with Holm's p in its family
  at one truth.

  An interaction in per cent is a ratio of ratios; on the two scales it may differ in sign.
  """
  found, table = errors_of_cells(rows), []
  for family, truth, name, weights in contrasts(found):
    values = np.stack([found[cell] for cell in weights])
    given = list(weights.values())
    log = statistics.paired_contrast(np.log(values), given)
    table.append({
      "family": family, "effect": name, "truth": truth, "seeds": values.shape[1],
      **_ends("mse", statistics.paired_contrast(values, given)),
      **_ends("percent", statistics.Interval(*kept.percent(np.array(log)))),
      "p_value": statistics.paired_p_value(given @ np.log(values), np.zeros(values.shape[1])),
    })  # fmt: skip
  table = pd.DataFrame(table)
  table["p_holm"] = table.groupby(["family", "truth"])["p_value"].transform(statistics.holm)
  return table


def _ends(name: str, interval: statistics.Interval) -> dict[str, float]:
  return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
