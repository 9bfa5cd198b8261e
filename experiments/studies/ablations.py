"""What changes the error when one part of the routing is changed?

Every level against its reference, paired by seed: `docs/studies/ablations.md`.

  python launch.py --config=configs/ablations.py --workdir=runs/ablations --sweep
  python -m experiments ablations --from=runs/ablations
"""

import pandas as pd
from matplotlib import figure

from experiments import committed, comparisons
from experiments import study as study_lib
from experiments.report import panels, style
from qlora_jax.adapters import sizing
from qlora_jax.studies import statistics

TASKS = ("regimes", "multi_target")
# Levels whose reference is not the task's default, but a level of the same rank or depth.
REFERENCES = {
  "regimes": {
    "memory=a router a map, rank 6": "rank for atoms=6",
    "memory=a memory a map, rank 6": "rank for atoms=6",
  },
  "multi_target": {
    "memory=a router a map, rank 5": "rank for atoms=5",
    "memory=a memory a map, rank 5": "rank for atoms=5",
  },
}
DEEP, DEEP_REFERENCE = "layers a block", "layers a block=1 of 8"
BUDGETS = {False: 8192, True: 16_384}  # of four and of eight layers
_BETTER, _WORSE = "#0072b2", "#d55e00"


def reference(task: str, method: str) -> str:
  """The method that `method` is compared with."""
  if method.startswith(DEEP):
    return DEEP_REFERENCE
  return REFERENCES[task].get(method, "default")


def levels(rows: pd.DataFrame) -> pd.DataFrame:
  """One row per task and level, in the order of training: error, and difference in per cent.

  `p_holm` is corrected over the levels of one factor. Over 30 comparisons ten seeds, whose least
  p-value is 2 / 2^10, could not show any difference. `matched` says whether the number of
  parameters is the budget within 2 %.
  """
  table = []
  for task in TASKS:
    task_rows = rows[rows["task"] == task]
    if task_rows.empty:
      continue
    errors, chosen = comparisons.scores(task_rows, "test_mse"), comparisons.chosen(task_rows)
    for method in chosen.index:
      if method not in errors:
        continue
      factor, _, level = method.partition("=")
      budget = BUDGETS[factor == DEEP]
      values, against = errors[method].to_numpy(), reference(task, method)
      row = {
        "task": task,
        "factor": factor,
        "level": level,
        "reference": against,
        **chosen.loc[method],
        "seeds": len(values),
        "matched": abs(chosen.loc[method, "trainable_params"] / budget - 1) <= sizing.TOLERANCE,
        **comparisons.columns_of("mse", statistics.bootstrap_mean(values)),
      }
      if against in errors and against != method:
        other = errors[against].to_numpy()
        relative = statistics.paired_bootstrap_relative(values, other)
        row |= comparisons.columns_of("percent", relative)
        row["p_value"] = statistics.paired_p_value(values, other)
      table.append(row)
  table = pd.DataFrame(table)
  for name in ("percent", "percent_low", "percent_high", "p_value"):
    if name not in table:  # no level has its reference yet
      table[name] = float("nan")
  with_reference = table["p_value"].notna()
  table.loc[with_reference, "p_holm"] = (
    table[with_reference].groupby(["task", "factor"])["p_value"].transform(statistics.holm)
  )
  return table


def summarise(results: committed.Results) -> str:
  """Writes levels.csv and summary.md: a table per task, levels in the order of training."""
  table, lines = levels(results.rows), []
  results.write("levels.csv", table)
  header = ["factor", "level", "rank", "atoms", "parameters", "rate"]
  header += ["atoms in use", "test MSE", "to the reference", "p (Holm)", "reference"]
  for task, task_rows in table.groupby("task", sort=False):
    rows = []
    for row in task_rows.itertuples():
      compared = pd.notna(row.percent)
      rows.append(
        [
          row.factor,
          row.level,
          f"{row.rank}",
          f"{row.atoms}",
          f"{row.trainable_params:,}{'' if row.matched else ' (not matched)'}",
          f"{row.learning_rate:g}{' (edge)' if row.rate_at_edge else ''}",
          f"{row.effective_support:.1f}",
          comparisons.interval(row, "mse", ".3f", ""),
          comparisons.interval(row) if compared else "",
          f"{row.p_holm:.3f}" if compared else "",
          row.reference if compared else "",
        ]
      )
    lines += [f"`{task}`, noise 0.5:", "", comparisons.markdown(header, rows)]
  return results.write_text("summary.md", "\n".join(lines))


def compared_levels(results: committed.Results) -> pd.DataFrame:
  """The levels that have a reference."""
  table = results.table("levels.csv")
  return table[table["percent"].notna()]


def table(results: committed.Results) -> str:
  """Every level beside its reference."""
  rows = [
    [
      row["task"].replace("_", " "),
      str(row["factor"]),
      "" if pd.isna(row["level"]) else str(row["level"]),
      f"{row['trainable_params']:,.0f}" + ("" if row["matched"] else " (not matched)"),
      f"{row['mse']:.3f}",
      comparisons.signed_interval(row),
      f"{row['p_holm']:.3f}",
    ]
    for row in compared_levels(results).to_dict("records")
  ]
  header = ["task", "factor", "level", "trainable", "test MSE", "change", "p (Holm)"]
  return comparisons.markdown(header, rows)


def claims(results: committed.Results) -> list[study_lib.Claim]:
  """Changes of matched size with a significantly higher or lower error, by task.

  Rule: Holm's p within a factor is below 0.05, and the interval excludes zero.
  """
  claim_list = []
  for task, rows in compared_levels(results).groupby("task", sort=False):
    rows = rows[rows["matched"].astype(bool)]
    clear = rows[(rows["p_holm"] < 0.05)]
    for word, part in (
      ("higher", clear[clear["percent_low"] > 0]),
      ("lower", clear[clear["percent_high"] < 0]),
    ):
      names = [f"{row.factor}: {row.level} ({row.percent:+.0f} %)" for row in part.itertuples()]
      claim_list.append(
        study_lib.Claim(
          f"{task.replace('_', ' ')}: a change gives a clearly {word} error",
          f"{len(part)} of {len(rows)} changes",
          comparisons.typographic(", ".join(names)) or "none",
        )
      )
  return claim_list


def draw(results: committed.Results) -> figure.Figure | None:
  """The difference of each level to its reference, a panel per task."""
  compared = compared_levels(results)
  if compared.empty:
    return None
  tasks = list(dict.fromkeys(compared["task"]))
  rows = max((compared["task"] == task).sum() for task in tasks)
  drawing = figure.Figure(figsize=(9.6, 1.6 + 0.19 * rows), layout="constrained")
  axes = drawing.subplots(1, len(tasks), squeeze=False)[0]
  lowest = min(
    _panel(axis, compared[compared["task"] == task]) for axis, task in zip(axes, tasks, strict=True)
  )
  for axis, task in zip(axes, tasks, strict=True):
    axis.set_ylim(lowest - 1, 0)
    axis.set_title(f"{task.replace('_', ' ')}, noise 0.5")
  drawing.legend(handles=_handles(), loc="outside lower center", ncols=4)
  return drawing


def _panel(axis, table: pd.DataFrame) -> float:
  """Draws a task's levels from the top down; returns the height of the last."""
  order = list(dict.fromkeys(table["factor"]))
  height, ticks, before = 0.0, {}, None
  for row in sorted(table.itertuples(), key=lambda level: order.index(level.factor)):
    height -= 1.5 if before not in (None, row.factor) else 1.0
    before = row.factor
    level = "" if pd.isna(row.level) else row.level
    ticks[height] = f"{row.factor}: {level}"
    sure = row.p_holm < 0.05
    color = style.MUTED if not sure else _BETTER if row.percent < 0 else _WORSE
    axis.plot([row.percent_low, row.percent_high], [height] * 2, color=color, linewidth=1.4)
    axis.plot(
      row.percent,
      height,
      "o" if row.matched else "D",
      color=color,
      markersize=4.5,
      markerfacecolor=color if sure else style.PAPER,
    )
  axis.axvline(0, color=style.INK, linewidth=0.6)
  axis.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
  axis.set_xlabel("change of test MSE to the reference, %")
  axis.grid(axis="x")
  return height


def _handles() -> list:
  marks = (
    ("o", _BETTER, _BETTER, "lower error (p < .05, Holm)"),
    ("o", _WORSE, _WORSE, "higher error (p < .05, Holm)"),
    ("o", style.MUTED, style.PAPER, "not significant"),
    ("D", style.INK, style.INK, "parameters not matched"),
  )
  return [
    panels.mark(label, marker=marker, color=color, markerfacecolor=face)
    for marker, color, face, label in marks
  ]


STUDY = study_lib.Study(
  name="ablations",
  question="What changes the error when one part is changed?",
  about="One part at a time is changed in Queryable LoRA, on a task where the right correction"
  " depends on the input and on one where it depends on the instruction. After each change the"
  " atoms fill the same number of parameters again. Every level is trained separately and compared"
  " with its reference over ten paired seeds.",
  config="configs/ablations.py",
  results="ablations",
  claims=claims,
  tables={"ablations": table},
  caption="Change of test error in per cent when one thing is changed in Queryable LoRA, with"
  " paired 95 % bootstrap intervals over ten seeds; coloured where Holm's p within a factor is"
  " below .05. Diamonds do not have the reference's number of parameters.",
  draw=draw,
  summarise=summarise,
  position=90,
)
