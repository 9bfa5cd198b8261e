"""The table of a sweep over a language model: methods, their chosen rates, scores, differences."""

import itertools
import pathlib

import pandas as pd

from qlora_jax.evaluation import statistics

_KEYS = ["method", "in_prompt", "shuffled"]


def write(workdir: pathlib.Path) -> str:
  """Writes `report/summary.md` from `results.parquet` and returns its text."""
  rows = pd.read_parquet(workdir / "results.parquet")
  text = summary(rows)
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
  return f"{text}\n\nreport: {folder / 'summary.md'}"


def label(method: str, in_prompt: bool, shuffled: bool) -> str:
  """What a setting is called in a table."""
  return method + (" + prompt" if in_prompt else "") + (" (shuffled)" if shuffled else "")


def summary(rows: pd.DataFrame) -> str:
  """Markdown: a line a setting, then the difference of each to the first LoRA with a prompt."""
  final = rows[rows["stage"] == "final"]
  lines = [
    "| method | learning rate | trained | seeds | validation nats | exact match, new wordings |"
    " exact match, known wordings |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for key, own in final.groupby(_KEYS, sort=False):
    nats = f"{own['validation_nats'].mean():.3f} ± {own['validation_nats'].std(ddof=1):.3f}"
    lines.append(
      f"| {label(*key)} | {own['learning_rate'].iloc[0]:g} | {own['trainable_params'].iloc[0]:,} |"
      f" {len(own)} | {nats} | {_share(own, 'test_accuracy')} |"
      f" {_share(own, 'test_seen_accuracy')} |"
    )
  for in_prompt, own in final.groupby("in_prompt", sort=False):
    base = own.iloc[0]
    if "base_test_accuracy" in own:
      name = "base + prompt" if in_prompt else "base"
      lines.append(
        f"| {name} | | 0 | | | {100 * base['base_test_accuracy']:.1f} % |"
        f" {100 * base['base_test_seen_accuracy']:.1f} % |"
      )
  lines += ["", *_differences(final)]
  return "\n".join(lines).rstrip()


def _share(own: pd.DataFrame, column: str) -> str:
  if column not in own or own[column].isna().all():
    return ""
  values = 100 * own[column]
  spread = f" ± {values.std(ddof=1):.1f}" if len(own) > 1 else ""
  return f"{values.mean():.1f}{spread} %"


def _differences(final: pd.DataFrame) -> list[str]:
  """Paired differences by seed, between settings that have the same prompt."""
  lines = []
  for _, own in final.groupby("in_prompt", sort=False):
    groups = [(key, group.set_index("seed")) for key, group in own.groupby(_KEYS, sort=False)]
    for (first, a), (second, b) in itertools.combinations(groups, 2):
      shared = a.index.intersection(b.index)
      if len(shared) < 2 or first[0] != "lora":
        continue
      found = statistics.paired_bootstrap(
        b.loc[shared, "validation_nats"], a.loc[shared, "validation_nats"]
      )
      lines.append(
        f"{label(*second)} minus {label(*first)}: {found.mean:+.3f} nats"
        f" [{found.low:+.3f}, {found.high:+.3f}] over {len(shared)} seeds (below zero: better)"
      )
  return lines
