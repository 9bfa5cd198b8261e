"""Training stability as defined quantities, method by method; `docs/protocol.md` defines them."""

import math

import numpy as np
import pandas as pd

from experiments.report import inputs, style, tables
from qlora_jax.studies import stability, statistics

HEADINGS = {
  "search_runs": "Search runs",
  "diverged": "Diverged",
  "spikes": "Loss spikes",
  "basin": "Basin",
  "narrowest": "Narrowest basin",
  "spread": "Spread, %",
  "against": "Spread against",
  "failed": "Final runs without result",
}


# Methods whose predictions read the instruction.
_READ = (
  "full_input",
  "lora_input",
  "queryable_prior",
  "queryable_query",
  "queryable_prior_query",
)


def table(study: inputs.Study, summary: pd.DataFrame) -> pd.DataFrame:
  """One row per method over all data sets, in the order of every table.

  Columns: `settings`, `search_runs`, `diverged` (share of the search runs), `spikes` and
  `spiked_runs` (loss spikes, and runs recorded for them, of both stages; NaN without curves),
  `basin` and `narrowest` (median and least decades), `spread` (median over the data sets, in
  percent of the error), `steadier`, `alike`, `less_steady` (data sets by the interval of the ratio
  of spreads to the baseline's), `ratio` (its median), `failed` and `finals` (final runs without
  result, and all).
  """
  of, found = study.measure, spikes(study)
  own = summary.drop_duplicates([*inputs.SETTING, "arm"])
  # Of several baselines the last reads the instruction, the first does not: as the method does.
  against = summary[np.isfinite(summary["spread_ratio"]) & (summary["arm"] != "lora")]
  reads, key = against["arm"].isin(_READ), [*inputs.SETTING, "arm"]
  against = pd.concat(
    [
      against[~reads].groupby(key, sort=False).head(1),
      against[reads].groupby(key, sort=False).tail(1),
    ]
  )
  rows = []
  for key in style.ordered(own["arm"]):
    here, ratios = own[own["arm"] == key], against[against["arm"] == key]
    searched, basins = here["search_runs"].sum(), here["basin_decades"].dropna()
    counts = statistics.win_tie_loss(
      [
        (mean - 1, low - 1, high - 1)
        for mean, low, high in ratios[
          ["spread_ratio", "spread_ratio_low", "spread_ratio_high"]
        ].to_numpy()
      ]
    )
    runs = found[found["arm"] == key]["spikes"]
    rows.append(
      {
        "arm": key,
        "label": style.method(key).label,
        "settings": len(here),
        "search_runs": int(searched),
        "diverged": (here["diverged_share"] * here["search_runs"]).sum() / searched
        if searched
        else math.nan,
        "spikes": runs.sum() if len(runs) else math.nan,
        "spiked_runs": len(runs),
        "basin": basins.median() if len(basins) else math.nan,
        "narrowest": basins.min() if len(basins) else math.nan,
        "spread": 100 * (here["spread"] / here[of.key]).median(),
        "steadier": counts.wins,
        "alike": counts.ties,
        "less_steady": counts.losses,
        "ratio": ratios["spread_ratio"].median() if len(ratios) else math.nan,
        "failed": int(here["failed_runs"].sum()),
        "finals": int(here["num_seeds"].sum()),
      }
    )
  return pd.DataFrame(rows)


def cells(row: dict) -> list[str]:
  """A row's values as text, in the order of `HEADINGS`."""
  compared = row["steadier"] + row["alike"] + row["less_steady"]
  against = f"{row['steadier']} / {row['alike']} / {row['less_steady']}"
  spiked = math.isfinite(row["spikes"])
  return [
    str(row["search_runs"]),
    _share(row["diverged"]),
    f"{row['spikes']:.0f} in {row['spiked_runs']} runs" if spiked else tables.MISSING,
    tables.number(row["basin"], 2),
    tables.number(row["narrowest"], 2),
    tables.number(row["spread"], 2),
    against if compared else tables.MISSING,
    f"{row['failed']} of {row['finals']}",
  ]


def _share(value: float) -> str:
  return f"{100 * value:.1f} %" if math.isfinite(value) else tables.MISSING


def spikes(study: inputs.Study) -> pd.DataFrame:
  """[method, setting..., spikes] of every run with a recorded curve of its training loss."""
  names = [*inputs.SETTING, "arm", "stage"]
  if study.curves is None:
    return pd.DataFrame(columns=[*names, "spikes"])
  steps = study.curves.groupby("trial_id")["step"].transform("count")
  counts = []
  for _, part in study.curves.groupby(steps):  # runs with as many records, together
    part = part.sort_values(["trial_id", "step"], kind="stable")
    losses = part["train_loss"].to_numpy().reshape(part["trial_id"].nunique(), -1)
    counts.append(
      pd.DataFrame(
        {
          "trial_id": part["trial_id"].unique(),
          "spikes": stability.loss_spikes(np.maximum(losses, 0)),
        }
      )
    )
  runs = study.results[["trial_id", *names]].merge(pd.concat(counts), on="trial_id")
  return runs[runs["arm"] != "none"]
