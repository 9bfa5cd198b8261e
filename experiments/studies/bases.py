"""Does a verdict hold on other frozen networks, and when the same training is done again?

Queryable LoRA against LoRA on six frozen networks per task: `docs/studies/bases.md`. Network 0 is
the main study's. Where the sweep has not trained it, its comparisons are the stability study's,
which trained them again on the machine of the other five.

  python launch.py --config=configs/bases.py --workdir=runs/bases --sweep
  python -m experiments bases --from=runs/bases
"""

import functools

import numpy as np
import pandas as pd
from matplotlib import figure

from configs import bases as config
from experiments import committed, comparisons, routing_gain
from experiments import study as study_lib
from experiments.analysis import bases_figure
from experiments.report import inputs, style, tables
from experiments.studies import regression_error
from qlora_jax.studies import spread, statistics

GAIN_STUDY = "bases_gain"


def with_main_network(rows: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
  """The rows of all networks; if the main study's is missing, with `again` as network 0.

  Args:
    rows: of `configs/bases.py`, methods named `config.label(method, network)`.
    again: of `configs/regression.py:stability`. Of a task, the rows at the noise of the other
      networks are used.
  """
  if rows["arm"].str.endswith("/0").any():
    return rows
  level = rows.groupby("task")["noise_level"].first()
  main = again[again["noise_level"] == again["task"].map(level)]
  names = [config.label(method, 0) for method in main["arm"]]
  return pd.concat([main.assign(arm=names), rows], ignore_index=True)


def differences(rows: pd.DataFrame) -> pd.DataFrame:
  """One row per task and network: both errors, the chosen rates, and the difference in per cent.

  The interval is over the seeds of the adapters' training, paired, on this network and at these
  rates. A network is left out if a run of either method is missing.
  """
  table = []
  for task, (method, baseline) in config.PAIRS.items():
    task_rows = rows[rows["task"] == task]
    errors = comparisons.scores(task_rows, _column(task_rows)) if len(task_rows) else {}
    for network in sorted({int(name.split("/")[1]) for name in errors}):
      names = [config.label(name, network) for name in (method, baseline)]
      if not set(names) <= set(errors):
        continue
      a, b = (errors[name].to_numpy() for name in names)
      rates = comparisons.chosen(task_rows).loc[names, "learning_rate"]
      table.append(
        {
          "task": task,
          "base": network,
          "seeds": len(a),
          "arm": method,
          "baseline": baseline,
          "learning_rate": rates.iloc[0],
          "baseline_learning_rate": rates.iloc[1],
          "error": a.mean(),
          "baseline_error": b.mean(),
          **comparisons.columns_of("percent", statistics.paired_relative_interval(a, b)),
        }
      )
  return pd.DataFrame(table)


def pooled(differences: pd.DataFrame) -> pd.DataFrame:
  """One row per task: the mean over its networks in per cent, with Student's interval and Holm's p.

  A network is one value, the logarithm of the ratio of the two methods' mean errors. Its search,
  rates and seeds are inside. `scatter` is the standard deviation of these values, `by_seeds` the
  standard deviation that the seeds' intervals imply, both in per cent.
  """
  table = []
  for task, rows in differences.groupby("task", sort=False):
    if len(rows) < 2:
      continue
    logs = np.log(rows["error"] / rows["baseline_error"])
    interval, p_value = statistics.student(logs)
    errors = (rows["percent_high"] - rows["percent_low"]) / (2 * 1.96)
    change = statistics.Interval(*comparisons.percent(np.array(interval)))
    table.append(
      {
        "task": task,
        "bases": len(rows),
        "arm": rows["arm"].iloc[0],
        "baseline": rows["baseline"].iloc[0],
        **comparisons.columns_of("percent", change),
        "scatter": 100 * spread.standard_deviation(logs),
        "by_seeds": float(np.sqrt(np.mean(errors**2))),
        "p_value": p_value,
      }
    )
  table = pd.DataFrame(table)
  table["p_holm"] = statistics.holm(table["p_value"])
  table["verdict"] = comparisons.verdicts(table)
  return table


def _column(rows: pd.DataFrame) -> str:
  """The error without noise, where the task has one."""
  return "test_mse" if rows["test_mse"].notna().any() else "test_noisy_mse"


def summarise(results: committed.Results) -> str:
  """Writes differences.csv, pooled.csv and summary.md: means over the networks, then networks."""
  rows = with_main_network(results.rows, results.of("stability").rows)
  by_network = differences(rows)
  means = pooled(by_network)
  results.write("differences.csv", by_network)
  results.write("pooled.csv", means)
  mean_rows = [
    f"{row.task} | {row.arm} | {row.baseline} | {row.bases} | {comparisons.interval(row)} |"
    f" {row.scatter:.1f} | {row.by_seeds:.1f} | {tables.probability(row.p_holm)} | {row.verdict}"
    for row in means.itertuples()
  ]
  network_rows = [
    f"{row.task} | {row.base} | {row.baseline_error:.4f} | {row.error:.4f} |"
    f" {comparisons.interval(row)} | {row.learning_rate:g} | {row.baseline_learning_rate:g}"
    for row in by_network.itertuples()
  ]
  header = ["task", "method", "baseline", "networks", "mean difference"]
  header += ["scatter over networks, %", "expected of the seeds, %", "p (Holm)", "verdict"]
  text = comparisons.markdown(header, mean_rows)
  header = ["task", "network", "baseline's error", "error", "difference", "rate", "baseline's rate"]
  return results.write_text("summary.md", text + "\n" + comparisons.markdown(header, network_rows))


@functools.cache
def repeated(results: committed.Results) -> pd.DataFrame:
  """The main study's comparisons beside a second training of them on the same network.

  The second is the stability study, at the main level of noise. Its program records the loss every
  ten steps, so that rounding differs, in the frozen networks as well. Its columns end in _2.
  """
  names = [*inputs.SETTING, "arm", "baseline"]
  main, again = results.of("regression"), results.of("stability")
  second = regression_error.closest_baselines(again)
  both = regression_error.closest_baselines(main).merge(second, on=names, suffixes=("", "_2"))
  for study, suffix in ((main, ""), (again, "_2")):
    rates = study.summary.drop_duplicates([*inputs.SETTING, "arm"])
    rates = rates[[*inputs.SETTING, "arm", "learning_rate"]].rename(
      columns={"arm": "baseline", "learning_rate": f"baseline_rate{suffix}"}
    )
    both = both.merge(rates, on=[*inputs.SETTING, "baseline"])
  return both


def repeated_table(results: committed.Results) -> str:
  """Differences of both trainings, and the learning rates that their searches chose."""
  rows = []
  for row in repeated(results).to_dict("records"):
    cells = [row["setting"], row["label"]]
    for end in ("", "_2"):
      ends = (row[f"relative{which}{end}"] for which in ("", "_low", "_high"))
      cells += [
        tables.with_interval(*ends, tables.percent).replace(" [", " % ["),
        f"{row[f'learning_rate{end}']:g} / {row[f'baseline_rate{end}']:g}",
      ]
    rows.append(cells)
  header = ["setting", "method", "difference", "rate / LoRA's", "trained again", "rate / LoRA's"]
  return comparisons.markdown(header, rows)


def table(results: committed.Results) -> str:
  """The mean over six networks and the main study's first training, by task."""
  closest = regression_error.closest_baselines(results.of("regression"))
  main = closest.set_index("setting")["relative"]
  rows = []
  for row in results.table("pooled.csv").to_dict("records"):
    rows.append(
      f"{_setting(row['task'])} | {style.method(row['arm']).label} | {row['bases']} |"
      f" {comparisons.signed_interval(row)} | {row['scatter']:.1f} | {row['by_seeds']:.1f} |"
      f" {tables.probability(row['p_holm'])} | {row['verdict']} |"
      f" {tables.percent(main[_setting(row['task'])])} %"
    )
  header = ["task", "method", "networks", "difference to LoRA, mean over the networks"]
  header += ["scatter over networks, %", "expected of the seeds alone", "p (Holm)", "verdict"]
  return comparisons.markdown([*header, "main study's first training"], rows)


@functools.cache
def routed(results: committed.Results) -> pd.DataFrame:
  """A row per task: the routing gain over the networks, beside the error as trained.

  Its trials were trained once more at the rates that the searches chose: `configs/bases.py:gain`.
  """
  gain_study, rows = results.of(GAIN_STUDY), []
  for task, trials in gain_study.study.stage("final").groupby("task", sort=False):
    arm = trials["arm"].iloc[0].split("/")[0]
    gains = routing_gain.gains(f"{GAIN_STUDY} {task} {arm}", gain_study).set_index("column")
    networks = trials["arm"].nunique()
    row = {"task": task, "arm": arm, "networks": networks, "trials": len(trials)}
    row["error"] = trials.groupby("arm")["score"].mean().mean()
    for column in routing_gain.GAINS:
      row |= {f"{column}{end}": gains.loc[column, end] for end in ("mean", "low", "high")}
    for column in ("routing/support_start", "router/effective_support", "routing/moved_weights"):
      row[column] = trials[column].mean()
    rows.append(row)
  return pd.DataFrame(rows)


def gain_table(results: committed.Results) -> str:
  """`routed` in Markdown."""
  rows = []
  for row in routed(results).to_dict("records"):
    gains = [
      tables.with_interval(
        *(row[f"{column}{end}"] for end in ("mean", "low", "high")),
        lambda value: tables.signed(value, 2),
      )
      for column in routing_gain.GAINS
    ]
    start, end = row["routing/support_start"], row["router/effective_support"]
    rows.append(
      [
        _setting(row["task"]),
        style.method(row["arm"]).label,
        f"{row['networks']} / {row['trials']}",
        tables.number(row["error"]),
        *gains,
        f"{start:.1f} → {end:.1f}",
        f"{row['routing/moved_weights']:.2f}",
      ]
    )
  header = [
    "task",
    "method",
    "networks / trials",
    "test MSE as trained",
    *(f"rise with {words}" for words in routing_gain.GAINS.values()),
    "effective support, drawn → trained",
    "weights moved",
  ]
  return comparisons.markdown(header, rows)


def _setting(task: str) -> str:
  """A task's name in the main study, which has one of them at four levels of noise."""
  return "regimes, noise 0.5" if task == "regimes" else task.replace("_", " ")


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """The claim on test performance over networks, and whether a training repeats its verdicts.

  The rule is in `configs/bases.py`.
  """
  means = results.table("pooled.csv")
  by_verdict = {word: rows.to_dict("records") for word, rows in means.groupby("verdict")}
  better, worse = by_verdict.get("better", []), by_verdict.get("worse", [])
  verdict = "task-dependent" if better else "not supported"
  if not worse and len(better) > len(means) / 2:
    verdict = "supported"
  parts = [
    f"{_setting(row['task'])} {comparisons.signed_interval(row)}" for row in (*better, *worse)
  ]
  evidence = (
    f"lower on {len(better)} of {len(means)} tasks, higher on {len(worse)}"
    + (f" ({'; '.join(parts)})" if parts else "")
    + f", not significant on {len(means) - len(better) - len(worse)}; Holm over the tasks"
  )
  rows = repeated(results)
  same = rows["verdict"] == rows["verdict_2"]
  changed = "".join(
    f"; {row['setting']}: {row['verdict']}, then {row['verdict_2']}"
    for row in rows[~same].to_dict("records")
  )
  return [
    study_lib.Claim(
      "lower test error than LoRA over six frozen networks per task", verdict, evidence
    ),
    *(
      study_lib.Claim(
        f"the routing lowers the error on {row['task'].replace('_', ' ')}",
        "supported",
        f"{comparisons.signed_interval(row)} to LoRA over {row['bases']} networks",
        routing=f"{GAIN_STUDY} {row['task']} {row['arm']}",
      )
      for row in better
    ),
    study_lib.Claim(
      "the same verdict when the main study's comparisons are trained again",
      "supported" if same.all() else "supported in part",
      f"the same on {same.sum()} of {len(rows)}{changed}",
    ),
  ]


def draw(results: committed.Results) -> figure.Figure:
  """Differences to LoRA by task and network, with their means."""
  first = repeated(results).set_index("task")["relative"]
  others = {"main study's network, first training": first}
  return bases_figure.draw(results.table("differences.csv"), results.table("pooled.csv"), others)


STUDY = study_lib.Study(
  name="bases",
  question="Does a verdict hold on other frozen networks?",
  about="The main study trains every method on one frozen network per task. Its intervals are over"
  " the seeds of the adapters' training, at the rate that one search chose. Here each task has six"
  " networks, each with a search: five others, and the main study's, trained again on their"
  " machine, where only rounding differs from the first training.",
  config="configs/bases.py",
  results="bases",
  claims=claims,
  tables={"bases": table, "bases_gain": gain_table, "repeated": repeated_table},
  caption="Difference in test error of Queryable LoRA to LoRA in per cent by task. Dots: six"
  " frozen networks, the main study's (ringed) among them, each with a learning-rate search for"
  " both methods, with 95 % bootstrap intervals over ten seeds. Diamonds: their mean, Student's"
  " 95 % interval; filled where Holm's p over the tasks is below .05. Squares: the first training"
  " on the main study's network, on another machine, which does not count in the mean. On multi"
  " target both methods see the instruction.",
  draw=draw,
  summarise=summarise,
  position=20,
)
