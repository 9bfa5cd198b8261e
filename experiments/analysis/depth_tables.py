"""Tables of the depth study: tidy results on disk, and their summary."""

import pathlib
from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments import committed, comparisons
from experiments.analysis import depth_quantities as quantities
from qlora_jax.studies import statistics

FILES = {
  "runs": "runs.csv",
  "usage": "usage.parquet",
  "effects": "effects.parquet",
  "routing": "routing.csv",
}
Tables = dict[str, pd.DataFrame]  # by the keys of `FILES`
DRAWS = 100  # of the baseline with the atoms of each block in a random order
# Baselines of each arm of the transfer; the first shows the value of the source's memory.
AGAINST = {
  "source memory frozen": ("random memory frozen", "all from scratch"),
  "router alone, source memory": ("router alone, random memory", "all from scratch"),
  "source memory, all trained": ("all from scratch",),
  "random memory frozen": ("all from scratch",),
}


def write(rows: dict[str, list[dict]], results: pathlib.Path) -> None:
  """Writes the rows of `depth_training.run`."""
  results.mkdir(parents=True, exist_ok=True)
  for kind, name in FILES.items():
    table = pd.DataFrame(rows[kind])
    if name.endswith(".csv"):
      table.to_csv(results / name, index=False, float_format="%.6g")
      continue
    floats = table.select_dtypes("float64").columns
    table.astype({column: "float32" for column in floats}).to_parquet(results / name, index=False)


def read(results: committed.Results) -> Tables:
  """The tidy tables by kind."""
  tables = {kind: results.table(name) for kind, name in FILES.items()}
  runs = tables["runs"]
  return tables | {"runs": runs.assign(arm=runs["arm"].astype(object).fillna(""))}


def summarise(tables: Tables) -> pd.DataFrame:
  """Means over the final seeds with 95 % bootstrap intervals.

  Returns:
    [kind, setting, what, quantity, mean, low, high, seeds, p]; `what` is a state of the network or
    an arm, p Holm's over all comparisons of the transfer, NaN elsewhere.
  """
  rows = [*_similarity(tables), *_removal(tables), *_transfer(tables["runs"])]
  table = pd.DataFrame(rows)
  compared = table["p"].notna()
  if compared.any():
    table.loc[compared, "p"] = statistics.holm(table.loc[compared, "p"])
  return table


def usage(tables: Tables, setting: str, state: str) -> dict[int, np.ndarray]:
  """Mean weights [G, N, M] of each seed."""
  table = tables["usage"]
  table = table[(table["setting"] == setting) & (table["state"] == state)]
  parts = list(dict.fromkeys(table["part"]))
  shape = (len(parts), table["block"].max() + 1, table["atom"].max() + 1)
  # Rows are written in the order of `np.ndindex(shape)`.
  return {
    int(seed): rows["weight"].to_numpy(np.float64).reshape(shape)
    for seed, rows in table.groupby("seed", sort=True)
  }


def effects(tables: Tables, setting: str) -> dict[int, np.ndarray]:
  """Relative rise of the test error [1 + N, M] of each seed in percent, without each atom.

  The first row removes the atom from the whole network, the others from one block.
  """
  table = tables["effects"]
  table = table[(table["setting"] == setting) & (table["part"] == "all")]
  rises = {}
  for seed, rows in table.groupby("seed", sort=True):
    whole = rows.loc[rows["atom"] < 0, "mse"].item()
    grid = rows[rows["atom"] >= 0].pivot(index="block", columns="atom", values="mse").to_numpy()
    rises[int(seed)] = 100.0 * (grid.astype(np.float64) / whole - 1.0)
  return rises


def part_effects(tables: Tables, setting: str) -> dict[int, np.ndarray]:
  """Rise of the test error [G, M] of each seed and part without each atom in the whole network."""
  table = tables["effects"]
  table = table[(table["setting"] == setting) & (table["block"] < 0) & (table["part"] != "all")]
  rises = {}
  for seed, rows in table.groupby("seed", sort=True):
    whole = rows[rows["atom"] < 0].set_index("part")["mse"]
    grid = rows[rows["atom"] >= 0].pivot(index="part", columns="atom", values="mse")
    rises[int(seed)] = (grid.sub(whole, axis=0)).to_numpy(np.float64)
  return rises


def most_on_one_part(rise: np.ndarray) -> float:
  """Mean over atoms of the largest part's share of the errors' rises [G, M]; falls count as 0.

  It is 1 if each atom serves one part, and 1/G if it serves all parts equally.
  """
  rise = np.maximum(rise, 0.0)
  total = rise.sum(axis=0)
  return float(np.mean(rise.max(axis=0)[total > 0] / total[total > 0]))


def blocks_served(rise: np.ndarray) -> float:
  """Number of blocks in which an atom matters, mean over atoms, between 1 and N.

  It is (sum_b r_b)^2 / sum_b r_b^2 of the rises r [N, M] of the error without the atom in block b.
  Falls count as 0.
  """
  rise = np.maximum(rise, 0.0)
  rise = rise[:, rise.sum(axis=0) > 0]
  return float(np.mean(rise.sum(axis=0) ** 2 / np.sum(rise**2, axis=0)))


def _atoms_renamed(rise: np.ndarray) -> float:
  """Mean `blocks_served` with the atoms of each block in a random order."""
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


def _by_seed(values: dict[int, np.ndarray], of: Callable[[np.ndarray], float]) -> np.ndarray:
  return np.array([of(value) for value in values.values()])


def _similarity(tables: Tables) -> list[dict]:
  rows, beyond = [], {}
  for (setting, state), routing in tables["routing"].groupby(["setting", "state"], sort=False):
    routing = routing.sort_values("seed")

    def add(quantity, interval, labels=("similarity", setting, state), seeds=routing["seed"]):
      rows.append(_row(*labels, quantity, interval, len(seeds)))

    add("effective support", statistics.bootstrap_mean(routing["effective_support"]))
    weights = usage(tables, setting, state)
    for name, of in quantities.SIMILARITIES.items():
      blocks = _by_seed(weights, lambda w, of=of: quantities.across_blocks(w, of))
      renamed = _by_seed(weights, lambda w, of=of: quantities.atoms_renamed(w, of, DRAWS).mean())
      add(f"blocks, {name}", statistics.bootstrap_mean(blocks))
      add(f"blocks, {name}, atoms renamed", statistics.bootstrap_mean(renamed))
      add(f"blocks, {name}, excess", statistics.paired_bootstrap(blocks, renamed))
      beyond[setting, state, name] = blocks - renamed
      parts = _by_seed(weights, lambda w, of=of: quantities.across_parts(w, of))
      shuffled = routing[f"parts_{name}_labels_shuffled"].to_numpy()
      add(f"parts, {name}", statistics.bootstrap_mean(parts))
      add(f"parts, {name}, labels shuffled", statistics.bootstrap_mean(shuffled))
      add(f"parts, {name}, excess", statistics.paired_bootstrap(parts, shuffled))
  for (setting, state, name), after in beyond.items():
    if state == "trained":
      learned = statistics.paired_bootstrap(after, beyond[setting, "untrained", name])
      labels = ("similarity", setting, "trained - untrained", f"blocks, {name}, excess")
      rows.append(_row(*labels, learned, len(after)))
  return rows


def _removal(tables: Tables) -> list[dict]:
  rows = []
  for setting in dict.fromkeys(tables["effects"]["setting"]):
    risen, weights = effects(tables, setting), usage(tables, setting, "trained")
    by_part = part_effects(tables, setting)

    def add(quantity, values, setting=setting):
      interval = statistics.bootstrap_mean(values)
      rows.append(_row("removal", setting, "trained", quantity, interval, len(values)))

    add("everywhere, mean rise, %", _by_seed(risen, lambda r: r[0].mean()))
    add("everywhere, largest rise, %", _by_seed(risen, lambda r: r[0].max()))
    add("one block, mean rise, %", _by_seed(risen, lambda r: r[1:].mean()))
    add("one block, largest rise, %", _by_seed(risen, lambda r: r[1:].max()))
    add("atoms whose removal costs over 1 %", _by_seed(risen, lambda r: np.mean(r[0] > 1.0)))
    served = _by_seed(risen, lambda r: blocks_served(r[1:]))
    renamed = _by_seed(risen, lambda r: _atoms_renamed(r[1:]))
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
    add("rise on one part", _by_seed(by_part, most_on_one_part))
  return rows


def _transfer(runs: pd.DataFrame) -> list[dict]:
  rows = []
  runs = runs[runs["stage"] == "final"]
  for (kind, setting, arm), arm_runs in runs.groupby(["kind", "setting", "arm"], sort=False):
    error = arm_runs.sort_values("seed")["test_mse"].to_numpy()
    interval = statistics.bootstrap_mean(error)
    rows.append(_row(kind, setting, arm or "trained", "test mse", interval, len(error)))
    for other in AGAINST.get(arm, ()):
      theirs = runs[(runs["setting"] == setting) & (runs["arm"] == other)].sort_values("seed")
      if len(theirs) != len(error):
        continue  # that arm is not trained yet
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
  """The summary, a table per kind."""

  def cell(row) -> str:
    digits = 2 if abs(row.mean) < 10 else 1
    if row.quantity == "test mse" or "js" in row.quantity:
      digits = 3
    signed = "+" if row.quantity.startswith("difference") or "excess" in row.quantity else ""
    text = "{0:{s}.{d}f} [{1:{s}.{d}f}, {2:{s}.{d}f}]"
    return text.format(row.mean, row.low, row.high, s=signed, d=digits)

  parts = []
  for kind, kind_rows in summary.groupby("kind", sort=False):
    columns = list(dict.fromkeys(kind_rows["quantity"]))
    table = []
    for (setting, what), rows in kind_rows.groupby(["setting", "what"], sort=False):
      cells = {row.quantity: cell(row) for row in rows.itertuples()}
      table.append([setting, what, *(cells.get(column, "") for column in columns)])
    parts.append(f"### {kind}\n\n" + comparisons.markdown(["setting", "what", *columns], table))
  return "\n".join(parts)
