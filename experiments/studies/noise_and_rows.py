"""Is the error lower than LoRA's with other noise, and with few training rows?

Queryable LoRA against LoRA in every setting and over the kinds of noise, paired by seed:
`docs/studies/noise_and_rows.md`.

  python launch.py --config=configs/noise.py --workdir=runs/noise --sweep
  python -m experiments noise_and_rows --from=runs/noise
"""

import numpy as np
import pandas as pd
from matplotlib import figure

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.report import panels, style
from qlora_jax.data import noise
from qlora_jax.studies import statistics

SETTING = ["task", "noise_kind", "noise_level", "train_rows"]
_POOLED = ["task", "noise_level", "train_rows", "seeds", "percent", "percent_low", "percent_high"]
_POOLED += ["effect_size", "p_value"]
# (task, level) -> colour, marker, line.
_LINES = {
  ("regimes", 0.25): ("#0072b2", "o", "-"),
  ("regimes", 0.5): ("#d55e00", "s", "-"),
  ("regimes", 1.0): ("#009e73", "^", "-"),
  ("friedman1", 0.5): (style.INK, "D", "--"),
}


def differences(rows: pd.DataFrame) -> pd.DataFrame:
  """One row per setting: both errors, and the difference in per cent.

  `p_holm` is corrected over the kinds and rows at one noise level of a task, 15 comparisons. Over
  45 comparisons ten seeds, whose least p-value is 2 / 2^10, could not show any difference. A
  setting is left out if a run of either method is missing.
  """
  table = []
  for task, task_rows in rows.groupby("task", sort=False):
    errors = comparisons.scores(task_rows, "test_mse")
    chosen = comparisons.chosen(task_rows)
    for method in errors:
      name, kind, level, count = method.split("/")
      baseline = f"lora/{kind}/{level}/{count}"
      if name == "lora" or baseline not in errors:
        continue
      a, b = errors[method].to_numpy(), errors[baseline].to_numpy()
      table.append(
        {
          "task": task,
          "noise_kind": kind,
          "noise_level": float(level),
          "train_rows": int(count),
          "seeds": len(a),
          "learning_rate": chosen.loc[method, "learning_rate"],
          "lora_learning_rate": chosen.loc[baseline, "learning_rate"],
          "rate_at_edge": bool(chosen.loc[[method, baseline], "rate_at_edge"].any()),
          "error": a.mean(),
          "lora_error": b.mean(),
          **comparisons.columns_of("percent", statistics.paired_bootstrap_relative(a, b)),
          "effect_size": statistics.effect_size(a, b),
          "p_value": statistics.paired_p_value(a, b),
        }
      )
  table = pd.DataFrame(table).sort_values(
    SETTING, key=lambda c: -c.eq("regimes") if c.name == "task" else c, ignore_index=True
  )
  table["p_holm"] = table.groupby(["task", "noise_level"])["p_value"].transform(statistics.holm)
  table["verdict"] = comparisons.verdicts(table)
  return table


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
  """One row per task, noise level and number of rows: the mean over the kinds in per cent.

  It is the mean of the logarithms' differences over the kinds, seed by seed. All kinds of a seed
  share their draws, so that seeds and not settings are resampled. Holm's p is over all rows.
  """
  table = []
  for task, task_rows in rows.groupby("task", sort=False):
    errors = comparisons.scores(task_rows, "test_mse")
    for level, count in sorted({tuple(name.split("/")[2:]) for name in errors}, key=_numbers):
      pairs = [
        (f"queryable/{kind}/{level}/{count}", f"lora/{kind}/{level}/{count}")
        for kind in noise.KINDS
      ]
      if not {name for pair in pairs for name in pair} <= set(errors):
        continue
      logs = np.mean([np.log(errors[ours] / errors[lora]) for ours, lora in pairs], axis=0)
      change = comparisons.percent(np.array(statistics.bootstrap_mean(logs)))
      table.append(
        {
          "task": task,
          "noise_level": float(level),
          "train_rows": int(count),
          "seeds": len(logs),
          **comparisons.columns_of("percent", statistics.Interval(*change)),
          "effect_size": statistics.effect_size(logs, np.zeros_like(logs)),
          "p_value": statistics.paired_p_value(logs, np.zeros_like(logs)),
        }
      )
  table = pd.DataFrame(table, columns=_POOLED)  # empty while no setting has all kinds of noise
  table["p_holm"] = statistics.holm(table["p_value"])
  table["verdict"] = comparisons.verdicts(table)
  return table


def _numbers(names: tuple[str, ...]) -> tuple[float, ...]:
  return tuple(map(float, names))


def summarise(results: committed.Results) -> str:
  """Writes differences.csv, pooled.csv and summary.md: means over the kinds, then all settings."""
  single, means = differences(results.rows), pooled(results.rows)
  results.write("differences.csv", single)
  results.write("pooled.csv", means)
  mean_rows = [
    f"{row.task} | {row.noise_level:g} | {row.train_rows:,} | {comparisons.interval(row)} |"
    f" {row.effect_size:+.1f} | {row.p_holm:.3f} | {row.verdict}"
    for row in means.itertuples()
  ]
  single_rows = [
    f"{row.task} | {row.noise_kind.replace('_', ' ')} | {row.noise_level:g} |"
    f" {row.train_rows:,} | {row.lora_error:.4f} | {row.error:.4f} |"
    f" {comparisons.interval(row)} | {row.p_holm:.3f} |"
    f" {row.verdict}{' (rate at an edge)' if row.rate_at_edge else ''}"
    for row in single.itertuples()
  ]
  header = ["task", "level", "training rows", "mean difference over five kinds", "effect size"]
  text = comparisons.markdown([*header, "p (Holm)", "verdict"], mean_rows)
  header = ["task", "noise", "level", "training rows", "LoRA's test MSE", "Queryable LoRA's"]
  text += "\n" + comparisons.markdown([*header, "difference", "p (Holm)", "verdict"], single_rows)
  return results.write_text("summary.md", text)


def table(results: committed.Results) -> str:
  """The mean over the kinds of noise, by task, level and number of training rows."""
  single = results.table("differences.csv").groupby(["task", "noise_level", "train_rows"])
  kinds = single["percent"].agg(["min", "max"])
  rows = []
  for row in results.table("pooled.csv").to_dict("records"):
    low, high = kinds.loc[(row["task"], row["noise_level"], row["train_rows"])]
    rows.append(
      f"{row['task']} | {row['noise_level']:g} | {row['train_rows']:,} |"
      f" {comparisons.signed_interval(row)} |"
      f" {comparisons.typographic(f'{low:+.1f} to {high:+.1f} %')} | {row['p_holm']:.3f} |"
      f" {row['verdict']}"
    )
  header = (
    "task | noise | training rows | difference to LoRA, mean of five kinds of noise |"
    " single kinds | p (Holm) | verdict"
  )
  return comparisons.markdown(header, rows)


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """Whether the error is lower, by task and number of rows, over the levels of noise."""
  verdicts = {"better": "supported", "worse": "not supported", "not significant": "inconclusive"}
  claim_list, means = [], results.table("pooled.csv")
  for (task, count), rows in means.groupby(["task", "train_rows"], sort=False):
    words = [verdicts[word] for word in rows["verdict"]]
    evidence = "; ".join(
      f"noise {row['noise_level']:g}: {comparisons.signed_interval(row)}"
      for row in rows.to_dict("records")
    )
    claim_list.append(
      study_lib.Claim(
        f"lower error than LoRA on {task} with {count:,} training rows, over five kinds of noise",
        words[0]
        if len(set(words)) == 1
        else "supported in part"
        if "supported" in words
        else "not supported",
        evidence,
      )
    )
  return claim_list


def draw(results: committed.Results) -> figure.Figure:
  """The difference to LoRA against the number of training rows, a panel per kind of noise."""
  single = results.table("differences.csv")
  kinds = list(dict.fromkeys(single["noise_kind"]))
  drawing = figure.Figure(figsize=(9.6, 3.2), layout="constrained")
  axes = drawing.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
  for axis, kind in zip(axes, kinds, strict=True):
    _panel(axis, single[single["noise_kind"] == kind])
    axis.set_title(kind.replace("_", " "), fontsize=8)
  axes[0].set_ylabel("test MSE against LoRA's, %")
  axes[len(axes) // 2].set_xlabel("training rows")
  drawing.legend(handles=_handles(single), loc="outside lower center", ncols=5)
  return drawing


def _panel(axis, rows: pd.DataFrame) -> None:
  counts = sorted(rows["train_rows"].unique())
  groups = [
    (key, part.sort_values("train_rows"))
    for key, part in rows.groupby(["task", "noise_level"])
    if key in _LINES
  ]
  groups.sort(key=lambda group: list(_LINES).index(group[0]))
  for place, (key, part) in enumerate(groups):
    color, marker, line = _LINES[key]
    shift = 1.0 + 0.07 * (place - (len(groups) - 1) / 2)  # on a logarithmic axis
    x = part["train_rows"] * shift
    axis.errorbar(
      x,
      part["percent"],
      yerr=[part["percent"] - part["percent_low"], part["percent_high"] - part["percent"]],
      color=color,
      linestyle=line,
      elinewidth=1,
      linewidth=1,
    )
    for value, row in zip(x, part.itertuples(), strict=True):
      axis.plot(
        value,
        row.percent,
        marker,
        color=color,
        markersize=4.5,
        markerfacecolor=style.PAPER if row.verdict == "not significant" else color,
      )
  axis.axhline(0, color=style.INK, linewidth=0.6)
  axis.set_xscale("log")
  axis.set_xticks(counts, [f"{count:,}" for count in counts])
  axis.minorticks_off()
  axis.grid(axis="y")


def _handles(rows: pd.DataFrame) -> list:
  present = set(zip(rows["task"], rows["noise_level"], strict=True))
  handles = [
    panels.mark(f"{task}, noise {level:g}", color=color, marker=marker, linestyle=line)
    for (task, level), (color, marker, line) in _LINES.items()
    if (task, level) in present
  ]
  hollow = {"color": style.MUTED, "marker": "o", "markerfacecolor": style.PAPER}
  return [*handles, panels.mark("hollow: not significant (Holm)", **hollow)]


STUDY = study_lib.Study(
  name="noise_and_rows",
  question="Is the error lower than LoRA's with other noise, and with few training rows?",
  about="Five kinds of noise at three levels, with 256, 1,024 and 8,192 training rows, on a task"
  " where Queryable LoRA has a lower error in the main study and on one where it has not."
  " Differences to LoRA are paired over ten seeds.",
  config="configs/noise.py",
  results="noise",
  claims=claims,
  tables={"noise_and_rows": table},
  caption="Difference in noise-free test error of Queryable LoRA to LoRA in per cent, with 95 %"
  " paired bootstrap intervals over ten seeds, against the number of training rows; a panel per"
  " kind of noise, a line per task and noise level (standard deviation of the noise in units of the"
  " target's). Hollow marks are not significant (Holm's p at a noise level of a task).",
  draw=draw,
  summarise=summarise,
  position=30,
)
