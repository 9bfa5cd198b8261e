"""The depth study's tables: tidy results on disk, and the summary that they give."""

import pathlib
from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments.depth import quantities
from qlora_jax.studies import statistics

FILES = {
  "runs": "runs.csv",
  "usage": "usage.parquet",
  "effects": "effects.parquet",
  "routing": "routing.csv",
}
DRAWS = 100  # of the baseline in which each block's atoms change their names
# What an arm of the transfer is compared with: the first says what the source's memory is worth.
AGAINST = {
  "source memory frozen": ("random memory frozen", "all from scratch"),
  "router alone, source memory": ("router alone, random memory", "all from scratch"),
  "source memory, all trained": ("all from scratch",),
  "random memory frozen": ("all from scratch",),
}


def write(found: dict[str, list[dict]], results: pathlib.Path) -> None:
  """Writes the rows of `train.run`."""
  results.mkdir(parents=True, exist_ok=True)
  for kind, name in FILES.items():
    table = pd.DataFrame(found[kind])
    if name.endswith(".csv"):
      table.to_csv(results / name, index=False, float_format="%.6g")
      continue
    floats = table.select_dtypes("float64").columns
    table.astype({column: "float32" for column in floats}).to_parquet(results / name, index=False)


def read(results: pathlib.Path) -> dict[str, pd.DataFrame]:
  """The tidy tables by kind."""
  found = {}
  for kind, name in FILES.items():
    path = results / name
    found[kind] = pd.read_csv(path) if name.endswith(".csv") else pd.read_parquet(path)
  found["runs"]["arm"] = found["runs"]["arm"].astype(object).fillna("")
  return found


def summarise(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
  """Means over the final seeds with 95 % bootstrap intervals.

  Returns:
    [kind, setting, what, quantity, mean, low, high, seeds, p]; `what` is a state of the network or
    an arm, p Holm's over all comparisons of the transfer, NaN elsewhere.
  """
  rows = [*_similarity(found), *_removal(found), *_transfer(found["runs"])]
  table = pd.DataFrame(rows)
  compared = table["p"].notna()
  if compared.any():
    table.loc[compared, "p"] = statistics.holm(table.loc[compared, "p"])
  return table


def usage(found: dict[str, pd.DataFrame], setting: str, state: str) -> dict[int, np.ndarray]:
  """Mean weights [G, N, M] of each seed."""
  table = found["usage"]
  table = table[(table["setting"] == setting) & (table["state"] == state)]
  parts = list(dict.fromkeys(table["part"]))
  shape = (len(parts), table["block"].max() + 1, table["atom"].max() + 1)
  # Rows are written in the order of `np.ndindex(shape)`.
  return {
    int(seed): own["weight"].to_numpy(np.float64).reshape(shape)
    for seed, own in table.groupby("seed", sort=True)
  }


def effects(found: dict[str, pd.DataFrame], setting: str) -> dict[int, np.ndarray]:
  """Relative rise of the test error [1 + N, M] of each seed, in percent, without each atom: out of
  the whole network first, then out of one block alone."""
  table = found["effects"]
  table = table[(table["setting"] == setting) & (table["part"] == "all")]
  made = {}
  for seed, own in table.groupby("seed", sort=True):
    whole = own.loc[own["atom"] < 0, "mse"].item()
    grid = own[own["atom"] >= 0].pivot(index="block", columns="atom", values="mse").to_numpy()
    made[int(seed)] = 100.0 * (grid.astype(np.float64) / whole - 1.0)
  return made


def part_effects(found: dict[str, pd.DataFrame], setting: str) -> dict[int, np.ndarray]:
  """Rise of the test error [G, M] of each seed and part without each atom in the whole network."""
  table = found["effects"]
  table = table[(table["setting"] == setting) & (table["block"] < 0) & (table["part"] != "all")]
  made = {}
  for seed, own in table.groupby("seed", sort=True):
    whole = own[own["atom"] < 0].set_index("part")["mse"]
    grid = own[own["atom"] >= 0].pivot(index="part", columns="atom", values="mse")
    made[int(seed)] = (grid.sub(whole, axis=0)).to_numpy(np.float64)
  return made


def most_on_one_part(rise: np.ndarray) -> float:
  """Mean over atoms of the largest part's share of the errors' rises [G, M], falls counted as 0.

  1 when each atom serves one part, 1/G when it serves all alike.
  """
  rise = np.maximum(rise, 0.0)
  total = rise.sum(axis=0)
  return float(np.mean(rise.max(axis=0)[total > 0] / total[total > 0]))


def blocks_served(rise: np.ndarray) -> float:
  """In how many blocks an atom matters: (sum_b r_b)^2 / sum_b r_b^2 of the rises r [N, M] of the
  error without it in block b, falls counted as 0; the mean over atoms, between 1 and N."""
  rise = np.maximum(rise, 0.0)
  rise = rise[:, rise.sum(axis=0) > 0]
  return float(np.mean(rise.sum(axis=0) ** 2 / np.sum(rise**2, axis=0)))


def _atoms_renamed(rise: np.ndarray) -> float:
  """Mean `blocks_served` where each block's atoms have an order of their own."""
  rng = np.random.default_rng(0)
  return float(np.mean([blocks_served(rng.permuted(rise, axis=1)) for _ in range(DRAWS)]))


def _row(kind, setting, what, quantity, interval, seeds, p=np.nan) -> dict:
  return {
    "kind": kind,
    "setting": setting,
    "what": what,
    "quantity": quantity,
    "mean": interval.mean,
    "low": interval.low,
    "high": interval.high,
    "seeds": seeds,
    "p": p,
  }


def _each_seed(values: dict[int, np.ndarray], of: Callable[[np.ndarray], float]) -> np.ndarray:
  return np.array([of(value) for value in values.values()])


def _similarity(found) -> list[dict]:
  rows, beyond = [], {}
  for (setting, state), own in found["routing"].groupby(["setting", "state"], sort=False):
    own = own.sort_values("seed")

    def add(quantity, interval, labels=("similarity", setting, state), seeds=own["seed"]):
      rows.append(_row(*labels, quantity, interval, len(seeds)))

    add("effective support", statistics.bootstrap_mean(own["effective_support"]))
    weights = usage(found, setting, state)
    for name, of in quantities.SIMILARITIES.items():
      blocks = _each_seed(weights, lambda w, of=of: quantities.across_blocks(w, of))
      renamed = _each_seed(weights, lambda w, of=of: quantities.atoms_renamed(w, of, DRAWS).mean())
      add(f"blocks, {name}", statistics.bootstrap_mean(blocks))
      add(f"blocks, {name}, atoms renamed", statistics.bootstrap_mean(renamed))
      add(f"blocks, {name}, excess", statistics.paired_bootstrap(blocks, renamed))
      beyond[setting, state, name] = blocks - renamed
      parts = _each_seed(weights, lambda w, of=of: quantities.across_parts(w, of))
      shuffled = own[f"parts_{name}_labels_shuffled"].to_numpy()
      add(f"parts, {name}", statistics.bootstrap_mean(parts))
      add(f"parts, {name}, labels shuffled", statistics.bootstrap_mean(shuffled))
      add(f"parts, {name}, excess", statistics.paired_bootstrap(parts, shuffled))
  for (setting, state, name), after in beyond.items():
    if state == "trained":
      learned = statistics.paired_bootstrap(after, beyond[setting, "untrained", name])
      labels = ("similarity", setting, "trained - untrained", f"blocks, {name}, excess")
      rows.append(_row(*labels, learned, len(after)))
  return rows


def _removal(found) -> list[dict]:
  rows = []
  for setting in dict.fromkeys(found["effects"]["setting"]):
    risen, weights = effects(found, setting), usage(found, setting, "trained")
    by_part = part_effects(found, setting)

    def add(quantity, values, setting=setting):
      interval = statistics.bootstrap_mean(values)
      rows.append(_row("removal", setting, "trained", quantity, interval, len(values)))

    add("everywhere, mean rise, %", _each_seed(risen, lambda r: r[0].mean()))
    add("everywhere, largest rise, %", _each_seed(risen, lambda r: r[0].max()))
    add("one block, mean rise, %", _each_seed(risen, lambda r: r[1:].mean()))
    add("one block, largest rise, %", _each_seed(risen, lambda r: r[1:].max()))
    add("atoms whose removal costs over 1 %", _each_seed(risen, lambda r: np.mean(r[0] > 1.0)))
    served = _each_seed(risen, lambda r: blocks_served(r[1:]))
    renamed = _each_seed(risen, lambda r: _atoms_renamed(r[1:]))
    add("blocks an atom serves", served)
    add("blocks an atom serves, atoms renamed", renamed)
    difference = statistics.paired_bootstrap(served, renamed)
    rows.append(
      _row("removal", setting, "trained", "blocks an atom serves, excess", difference, len(served))
    )
    correlations = {
      "usage and rise, atoms": lambda w, r: (w.mean(axis=(0, 1)), r[0]),
      "usage and rise, blocks and atoms": lambda w, r: (w.mean(axis=0), r[1:]),
    }
    for name, of in correlations.items():
      add(name, np.array([quantities.rank_correlation(*of(weights[s], risen[s])) for s in risen]))
    add("rise on one part", _each_seed(by_part, most_on_one_part))
  return rows


def _transfer(runs: pd.DataFrame) -> list[dict]:
  rows = []
  runs = runs[runs["stage"] == "final"]
  for (kind, setting, arm), own in runs.groupby(["kind", "setting", "arm"], sort=False):
    error = own.sort_values("seed")["test_mse"].to_numpy()
    interval = statistics.bootstrap_mean(error)
    rows.append(_row(kind, setting, arm or "trained", "test mse", interval, len(error)))
    for other in AGAINST.get(arm, ()):
      theirs = runs[(runs["setting"] == setting) & (runs["arm"] == other)].sort_values("seed")
      if len(theirs) != len(error):
        continue  # that arm is still to be run
      theirs = theirs["test_mse"].to_numpy()
      rows.append(
        _row(
          kind,
          setting,
          arm,
          f"difference to {other}, %",
          statistics.paired_bootstrap_relative(error, theirs),
          len(error),
          statistics.paired_p_value(error, theirs),
        )
      )
  return rows


def markdown(summary: pd.DataFrame) -> str:
  """The summary's three tables."""

  def cell(row) -> str:
    digits = 2 if abs(row.mean) < 10 else 1
    if row.quantity == "test mse" or "js" in row.quantity:
      digits = 3
    signed = "+" if row.quantity.startswith("difference") or "excess" in row.quantity else ""
    text = "{0:{s}.{d}f} [{1:{s}.{d}f}, {2:{s}.{d}f}]"
    return text.format(row.mean, row.low, row.high, s=signed, d=digits)

  lines = []
  for kind in dict.fromkeys(summary["kind"]):
    own = summary[summary["kind"] == kind]
    columns = list(dict.fromkeys(own["quantity"]))
    lines += ["", f"### {kind}", "", "| " + " | ".join(["setting", "what", *columns]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(columns) + 2)) + " |")
    for (setting, what), rows in own.groupby(["setting", "what"], sort=False):
      cells = {row.quantity: cell(row) for row in rows.itertuples()}
      values = [cells.get(column, "") for column in columns]
      lines.append("| " + " | ".join([setting, what, *values]) + " |")
  return "\n".join(lines[1:]) + "\n"
