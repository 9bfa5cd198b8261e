"""Does a verdict hold on other frozen networks, and when the same training is done again?"""

import functools
import pathlib

import pandas as pd

from experiments.bases import figure
from experiments.questions import committed, error, factorial, question, routing
from experiments.report import headline, inputs, style, tables

GAIN_STUDY = "bases_gain"


@functools.cache
def repeated() -> pd.DataFrame:
  """The main study's comparisons beside a second training of them on the same network.

  The second is the stability study, at the main level of noise: its program records the loss every
  ten steps, so that rounding differs, in the frozen networks, too. Columns of the second end in _2.
  """
  names = [*inputs.SETTING, "method", "baseline"]
  second = headline.compared(committed.summary("stability")).groupby(inputs.SETTING).tail(1)
  both = error.compared().merge(second, on=names, suffixes=("", "_2"))
  for study, suffix in (("regression", ""), ("stability", "_2")):
    rates = committed.summary(study).drop_duplicates([*inputs.SETTING, "method"])
    rates = rates[[*inputs.SETTING, "method", "learning_rate"]].rename(
      columns={"method": "baseline", "learning_rate": f"baseline_rate{suffix}"}
    )
    both = both.merge(rates, on=[*inputs.SETTING, "baseline"])
  return both


def repeated_table() -> str:
  """Differences of both trainings, and the learning rates that their searches chose."""
  rows = []
  for row in repeated().to_dict("records"):
    cells = [row["setting"], row["label"]]
    for end in ("", "_2"):
      ends = (row[f"relative{which}{end}"] for which in ("", "_low", "_high"))
      cells += [
        tables.with_interval(*ends, tables.percent).replace(" [", " % ["),
        f"{row[f'learning_rate{end}']:g} / {row[f'baseline_rate{end}']:g}",
      ]
    rows.append(cells)
  header = ["setting", "method", "difference", "rate / LoRA's", "trained again", "rate / LoRA's"]
  return committed.markdown(header, rows)


def table() -> str:
  """The mean over six networks and the main study's first training, by task."""
  main = error.compared().set_index("setting")["relative"]
  rows = []
  for row in committed.csv("bases", "pooled").to_dict("records"):
    rows.append(
      [
        _setting(row["task"]),
        style.method(row["method"]).label,
        f"{row['bases']}",
        factorial.ends(row),
        f"{row['scatter']:.1f}",
        f"{row['by_seeds']:.1f}",
        tables.probability(row["p_holm"]),
        row["verdict"],
        f"{tables.percent(main[_setting(row['task'])])} %",
      ]
    )
  header = [
    "task",
    "method",
    "networks",
    "difference to LoRA, mean over the networks",
    "scatter over networks, %",
    "expected of the seeds alone",
    "p (Holm)",
    "verdict",
    "main study's first training",
  ]
  return committed.markdown(header, rows)


@functools.cache
def routed() -> pd.DataFrame:
  """A row per task: what the routing gains over the networks, beside the error as trained.

  Of trials trained once more at the rates that the searches chose (`configs/bases.py:gain`).
  """
  final = committed.study(GAIN_STUDY).stage("final")
  rows = []
  for task, own in final.groupby("task", sort=False):
    arm = own["method"].iloc[0].split("/")[0]
    found = routing.gains(f"{GAIN_STUDY} {task} {arm}").set_index("column")
    row = {"task": task, "arm": arm, "networks": own["method"].nunique(), "trials": len(own)}
    row["error"] = own.groupby("method")["score"].mean().mean()
    for column in routing.GAINS:
      row |= {f"{column}{end}": found.loc[column, end] for end in ("mean", "low", "high")}
    for column in ("routing/support_start", "router/effective_support", "routing/moved_weights"):
      row[column] = own[column].mean()
    rows.append(row)
  return pd.DataFrame(rows)


def gain_table() -> str:
  """`routed` in Markdown."""
  rows = []
  for row in routed().to_dict("records"):
    gains = [
      tables.with_interval(
        *(row[f"{column}{end}"] for end in ("mean", "low", "high")),
        lambda value: tables.signed(value, 2),
      )
      for column in routing.GAINS
    ]
    start, end = (row[f"rout{which}"] for which in ("ing/support_start", "er/effective_support"))
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
    *(f"rise with {words}" for words in routing.GAINS.values()),
    "effective support, drawn → trained",
    "weights moved",
  ]
  return committed.markdown(header, rows)


def _setting(task: str) -> str:
  """A task's name in the main study, which has one of them at four levels of noise."""
  return "regimes, noise 0.5" if task == "regimes" else task.replace("_", " ")


def answer() -> list[question.Claim]:
  """The claim on test performance over networks, and how far one training can be trusted."""
  pooled = committed.csv("bases", "pooled")
  told = {verdict: own.to_dict("records") for verdict, own in pooled.groupby("verdict", sort=False)}
  better, worse = told.get("better", []), told.get("worse", [])
  verdict = "task-dependent" if better else "not supported"
  if not worse and len(better) > len(pooled) / 2:
    verdict = "supported"
  parts = [f"{_setting(row['task'])} {factorial.ends(row)}" for row in (*better, *worse)]
  evidence = (
    f"lower on {len(better)} of {len(pooled)} tasks, higher on {len(worse)}"
    + (f" ({'; '.join(parts)})" if parts else "")
    + f", not significant on {len(pooled) - len(better) - len(worse)}; Holm over the tasks"
  )
  rows = repeated()
  same = rows["verdict"] == rows["verdict_2"]
  changed = "".join(
    f"; {row['setting']}: {row['verdict']}, then {row['verdict_2']}"
    for row in rows[~same].to_dict("records")
  )
  return [
    question.Claim(
      "lower test error than LoRA over six frozen networks per task", verdict, evidence
    ),
    *(
      question.Claim(
        f"the routing lowers the error on {row['task'].replace('_', ' ')}",
        "supported",
        f"{factorial.ends(row)} to LoRA over {row['bases']} networks",
        routing=f"{GAIN_STUDY} {row['task']} {row['method']}",
      )
      for row in better
    ),
    question.Claim(
      "the same verdict when the main study's comparisons are trained again",
      "supported" if same.all() else "supported in part",
      f"the same on {same.sum()} of {len(rows)}{changed}",
    ),
  ]


def draw(target: pathlib.Path) -> None:
  """Writes `target`.svg and .png."""
  rows = repeated().set_index("task")
  figure.draw(
    committed.csv("bases", "differences"),
    committed.csv("bases", "pooled"),
    target,
    {"main study's network, first training": rows["relative"]},
  )


QUESTION = question.Question(
  name="bases",
  caption="Difference in test error of Queryable LoRA to LoRA in per cent by task. Dots: six"
  " frozen networks, the main study's (ringed) among them, each with a learning-rate search for"
  " both methods, with 95 % bootstrap intervals over ten seeds. Diamonds: their mean, Student's"
  " 95 % interval; filled where Holm's p over the tasks is below .05. Squares: the first training"
  " on the main study's network, on another machine, which does not count in the mean. On multi"
  " target both methods see the instruction.",
  study="bases",
  command="python launch.py --config=configs/bases.py --workdir=runs/bases --sweep",
  draw=draw,
  tables={"bases": table, "bases_gain": gain_table, "repeated": repeated_table},
  answer=answer,
)
