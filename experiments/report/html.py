"""The report as one HTML file that needs no network."""

import base64
import html
import json
import math
import pathlib
import re
from collections.abc import Sequence

import jinja2
import markupsafe
import numpy as np
import pandas as pd

from experiments.report import headline, inputs, measure, panels, stability, style, tables
from qlora_jax.studies import protocol

_MOST_SVG_BYTES = 2_500_000  # a larger drawing goes in as PNG
_MEANINGS = {
  "test_seen_accuracy": "the same inputs under wordings of the instruction that training used",
  "validation_nats": measure.NATS.meaning[0].lower() + measure.NATS.meaning[1:],
}
_MARKS = {"better": "▼", "worse": "▲", "no difference": "○", "diverged": "✕"}


def _columns(of: measure.Measure) -> list[tuple]:
  """(heading, meaning, summary column, formatter) of the full table; `None` for text."""
  unit, two = "" if of.relative else f", {of.contrast_unit}", lambda x: tables.number(x, 2)
  return [
    ("Data set", "task, and the noise where a task has several", "setting", None),
    ("Method", "see the list of methods below", "label", None),
    ("Trainable", "parameters that training changes", "trainable_params", tables.count),
    ("Learning rate", "chosen by the search", "learning_rate", tables.plain),
    *(
      (_heading(score.name), "mean over seeds [95 % interval]", score.key, tables.value(score))
      for score in (of, *of.also)
    ),
    ("Compared with", "the method that the difference is taken to", "baseline_label", None),
    (
      f"Difference{unit}",
      f"paired difference in {of.short} [95 % interval]",
      "difference",
      (lambda value: tables.signed(value, 2)) if of.relative else tables.contrast(of),
    ),
    *(
      [("Difference, %", "the same in percent of the other's error", "relative", tables.percent)]
      if of.relative
      else []
    ),
    ("Verdict", "whether the interval leaves out zero", "verdict", None),
    ("p", "chance of such a difference without a true one, corrected (Holm)", "p_holm", two),
    ("Spread", f"standard deviation of the {of.short} over seeds", "spread", tables.number),
    ("Basin", "decades of learning rate within 5 % of the best", "basin_decades", two),
    ("Diverged", "share of search runs that diverged", "diverged_share", tables.share),
  ]


def _heading(text: str) -> str:
  return text[0].upper() + text[1:]


def render(
  study: inputs.Study,
  summary: pd.DataFrame,
  drawn: Sequence[panels.Drawn],
  absent: Sequence[str],
  directory: pathlib.Path,
) -> str:
  """The whole page. `directory` is where the figures' files lie."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  template = environment.get_template("template.html.j2")
  figures = [_figure(number, item, directory) for number, item in enumerate(drawn, start=1)]
  of, steady = study.measure, ("curves", "learning_rates", "routers", "routing_gain")
  own = headline.compared(summary)
  subjects = set(zip(own["task"], own["arm"], strict=True))
  one_baseline = summary["baseline"].nunique() < 2
  columns = [c for c in _columns(of) if not (one_baseline and c[2] == "baseline_label")]
  return template.render(
    info=study.info,
    of=of,
    facts=_facts(study),
    headline=headline.write(summary),
    glance=_glance(summary, of),
    samples=_samples(study),
    columns=[{"name": n, "hint": hint, "text": f is None} for n, hint, _, f in columns],
    rows=[
      _row(row, columns, (row["task"], row["arm"]) in subjects)
      for row in summary.to_dict("records")
    ],
    settings=list(dict.fromkeys(summary["setting"])),
    result_figures=[f for f in figures if f["name"] not in steady],
    stability_figures=[f for f in figures if f["name"] in steady],
    absent=absent,
    stability=_stability(study, summary),
    routers=_routers(summary),
    gains=_gains(study),
    methods=[style.method(m) for m in style.ordered(summary["arm"])],
    protocol=_protocol(study, summary),
    unmet=unmet(study),
    report_command=f"python -m experiments.report --workdir={study.workdir.name}",
    config=json.dumps(study.info["config"], indent=2, default=str),
    marks=_MARKS,
  )


def _facts(study: inputs.Study) -> list[tuple[str, str]]:
  info = study.info
  devices = info["devices"]
  devices = devices if isinstance(devices, str) else ", ".join(map(str, devices))
  versions = ", ".join(f"{name} {version}" for name, version in dict(info["versions"]).items())
  final, search = len(study.stage("final")), len(study.stage("search"))
  facts = [
    ("Date", info["date"]),
    ("Commit", info["commit"]),
    ("Devices", devices),
    ("Software", versions),
    ("Runs", f"{search} in the search, {final} final"),
    ("Time", _hours(info["wall_seconds"])),
  ]
  return [(name, str(value)) for name, value in facts if value]


def _hours(seconds) -> str:
  if not isinstance(seconds, int | float) or not math.isfinite(seconds) or not seconds:
    return ""
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _glance(summary: pd.DataFrame, of: measure.Measure) -> dict | None:
  """One line a data set: the study's subject, its baseline, and the best method."""
  own = headline.compared(summary)
  if own.empty:
    return None
  rows, value = [], tables.value(of)
  for row in own.to_dict("records"):
    here = summary[(summary[inputs.SETTING] == [row[c] for c in inputs.SETTING]).all(axis=1)]
    other = here[here["arm"] == row["baseline"]].iloc[0]
    finished = here[np.isfinite(here[of.key]) & (here["failed_runs"] == 0)]
    best = (finished.nsmallest if of.lower else finished.nlargest)(1, of.key).to_dict("records")
    rows.append(
      {
        "setting": row["setting"],
        "arm": row["label"],
        "base": value(row[of.base] if of.base else math.nan),
        "baseline": style.method(row["baseline"]).label,
        "other": _interval(other, of.key, value),
        "own": _interval(row, of.key, value),
        "difference": _interval(row, of.contrast, tables.contrast(of)),
        "verdict": row["verdict"],
        "best": f"{best[0]['label']}, {value(best[0][of.key])}" if best else "",
      }
    )
  several = own[["arm", "baseline"]].drop_duplicates().shape[0] > 1
  return {
    "subject": f"Its {of.name}" if several else style.method(own["arm"].iloc[0]).label,
    "baseline": "Compared with" if several else rows[0]["baseline"],
    "several": several,
    "rows": rows,
  }


def _row(row: dict, columns: Sequence[tuple], is_subject: bool) -> dict:
  """The cells of one line of the full table, each with the value that it sorts by."""
  row = row | {"baseline_label": style.method(row["baseline"]).label if row["baseline"] else ""}
  cells = []
  for _, _, key, formatted in columns:
    value = row[key]
    if formatted is None:
      mark = f"{_MARKS[value]} " if key == "verdict" and value in _MARKS else ""
      kind = value.replace(" ", "-") if key == "verdict" else ""
      cells.append({"html": f"{mark}{value}", "sort": value, "text": True, "kind": kind})
      continue
    shown = _interval(row, key, formatted) if f"{key}_low" in row else formatted(value)
    sort = "" if not math.isfinite(value) else f"{value:.6g}"
    cells.append({"html": shown, "sort": sort, "text": False, "kind": ""})
  return {
    "setting": row["setting"],
    "cells": cells,
    "subject": is_subject,
    "failed": row["failed_runs"],
  }


def _interval(row, name: str, formatted) -> markupsafe.Markup:
  """A mean with its interval in smaller type."""
  mean, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
  text = html.escape(formatted(mean))
  if math.isfinite(mean) and math.isfinite(low):
    text += f' <span class="ci">[{formatted(low)}, {formatted(high)}]</span>'
  return markupsafe.Markup(text)


def _stability(study: inputs.Study, summary: pd.DataFrame) -> dict:
  """One line per method over all data sets."""
  rows = stability.table(study, summary).to_dict("records")
  return {
    "columns": list(stability.HEADINGS.values()),
    "rows": [[row["label"], *stability.cells(row)] for row in rows],
  }


def _routers(summary: pd.DataFrame) -> dict | None:
  """Means of the router's measurements over data sets, for the methods that have one."""
  own = summary.drop_duplicates([*inputs.SETTING, "arm"])
  columns = [c for c in inputs.ROUTER_COLUMNS if own[c].notna().any()]
  if not columns:
    return None
  means = own.groupby("arm")[columns].mean().dropna(how="all")
  return {
    "columns": [inputs.ROUTER_COLUMNS[c] for c in columns],
    "rows": [
      [style.method(m).label, *(tables.number(means.loc[m, c], 2) for c in columns)]
      for m in style.ordered(means.index)
    ],
  }


def _gains(study: inputs.Study) -> dict | None:
  """What the routing gains: a row per setting and method, with intervals over the final seeds."""
  final = study.stage("final")
  final = final[final[list(inputs.GAIN_COLUMNS)].notna().any(axis=1)]
  if final.empty:
    return None
  moved = [column for column in inputs.MOVED_COLUMNS if final[column].notna().any()]
  rows = []
  for setting in study.settings():
    own = final[(final[inputs.SETTING] == list(setting)).all(axis=1)]
    for method in style.ordered(own["arm"].unique()):
      runs = own[own["arm"] == method]
      gains = []
      for column in inputs.GAIN_COLUMNS:
        mean, low, high = tables.over_seeds(runs[column])
        text = tables.with_interval(mean, low, high, lambda value: tables.signed(value, 3))
        gains.append({"text": text, "above": low > 0})
      rows.append(
        {
          "setting": study.setting_label(setting),
          "arm": style.method(method).label,
          "seeds": int(np.isfinite(runs[next(iter(inputs.GAIN_COLUMNS))]).sum()),
          "gains": gains,
          "moved": [tables.number(runs[column].mean(), 2) for column in moved],
        }
      )
  return {
    "columns": list(inputs.GAIN_COLUMNS.values()),
    "moved": [inputs.MOVED_COLUMNS[column] for column in moved],
    "rows": rows,
  }


def unmet(study: inputs.Study) -> list[str]:
  """What a study that compares methods does not meet of the protocol; see `docs/protocol.md`."""
  if study.results["arm"].nunique() < 2:
    return []
  return protocol.check(study.results, protocol.rules_of(study.info["config"]))


def _protocol(study: inputs.Study, summary: pd.DataFrame) -> list[str]:
  """What was done, from the data itself."""
  search, final, of = study.stage("search"), study.stage("final"), study.measure
  lines = []
  if len(search):
    rates = sorted(search["learning_rate"].dropna().unique())
    per_point = search.groupby([*inputs.SETTING, "arm", "learning_rate"], dropna=False).size()
    lines.append(
      f"Search: every method was trained at each of {len(rates)} learning rates "
      f"({', '.join(f'{rate:g}' for rate in rates)}) with {headline.seeds(per_point)}. The rate "
      f"with the lowest mean {of.validation_noun.lower()} was chosen, for each method and data set "
      "by itself."
    )
  per_method = final.groupby([*inputs.SETTING, "arm"]).size()
  rate = "the chosen rate" if len(search) else "the learning rate that the config gives"
  unused = " that the search had not used" if len(search) else ""
  lines.append(
    f"Final runs: {rate} with {headline.seeds(per_method)}{unused}. "
    "The same seed gives every method the same data in the same order, so that differences are "
    "taken seed by seed."
  )
  if of is not measure.MSE:
    return [*lines, *_language_protocol(study)]
  with_truth = sorted(set(final.loc[final["noise_free"], "task"]))
  without = sorted(set(final.loc[~final["noise_free"], "task"]))
  text = "Test error: mean squared error (MSE) on held-out inputs"
  if with_truth:
    text += ", against the target before noise was added"
  if without:
    names = ", ".join(name.replace("_", " ") for name in without)
    text += f"{';' if with_truth else ','} for {names}, which has no known noise-free target, "
    text += "against the observed one"
  lines.append(text + ". Lower is better.")
  return lines


def _language_protocol(study: inputs.Study) -> list[str]:
  """How a language model was fine-tuned and judged, from its config and rows."""
  of, final, config = study.measure, study.stage("final"), study.info["config"]
  model, data, optimizer, scoring = (
    config.get(name, {}) for name in ("model", "data", "optimizer", "eval")
  )
  lines = []
  if "weights" in model and "name" in data:
    tasks = data.get("tasks") or ()
    rows = data.get("train_rows")
    lines.append(
      f"Model: {model['weights']}, frozen"
      + (f", computed in {model['dtype']}" if "dtype" in model else "")
      + f". Data: {data['name']}"
      + (f", tasks {', '.join(str(task).replace('_', ' ') for task in tasks)}" if tasks else "")
      + (f", {rows} training examples a task" if rows and tasks else "")
      + "."
    )
  if "batch_size" in optimizer and final["steps"].notna().any():
    low, high = final["steps"].min(), final["steps"].max()
    steps = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    lines.append(
      f"Training: {steps} steps of {optimizer['batch_size']} rows of at most {data.get('length')} "
      "tokens; the loss is over answer tokens alone."
    )
  lines.append(f"{of.meaning}. {_heading(of.better)} is better.")
  for also in of.also:
    if final[also.key].notna().any():
      better = "Lower" if also.lower else "Higher"
      lines.append(f"{_heading(also.name)}: {_MEANINGS[also.key]}. {better} is better.")
  if of is measure.EXACT_MATCH and "examples" in scoring:
    lines.append(
      f"Answers: at most {scoring['examples']} inputs a task and split, at most "
      f"{scoring.get('max_tokens')} tokens each. The model before training was asked the same, "
      "with the instruction in the prompt for the methods that have it there, and without it for "
      "the others."
    )
  return lines


def _samples(study: inputs.Study) -> list[dict]:
  """Answers of the subject's first final run, or of the first run that has any, by task."""
  if study.samples is None:
    return []
  final = study.stage("final")
  final = final[final["trial_id"].isin(study.samples["trial_id"])].sort_values(
    "seed", kind="stable"
  )
  if final.empty:
    return []
  subject = style.subject(final["task"].iloc[0], final["arm"])
  own = final[final["arm"] == (subject or style.ordered(final["arm"])[0])].iloc[0]
  rows = study.samples[study.samples["trial_id"] == own["trial_id"]]
  rows = rows.astype(object).where(rows.notna(), None)
  return [
    {
      "label": style.method(own["arm"]).label,
      "seed": f"{own['seed']:.0f}",
      "rows": rows.sort_values("task", kind="stable").to_dict("records"),
    }
  ]


def _figure(number: int, drawn: panels.Drawn, directory: pathlib.Path) -> dict:
  svg = (directory / f"{drawn.name}.svg").read_text(encoding="utf-8")
  width = drawn.figure.get_figwidth() / panels.WIDTH
  alt = f"{drawn.title}. {drawn.caption.split('. ')[0]}."
  if len(svg.encode()) > _MOST_SVG_BYTES:
    data = base64.b64encode((directory / f"{drawn.name}.png").read_bytes()).decode()
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
  else:
    image = _inline(svg, f"f{number}-", alt)
  return {
    "name": drawn.name,
    "number": number,
    "title": drawn.title,
    "caption": drawn.caption,
    "width": f"{100 * width:.0f}%",
    "file": f"{directory.name}/{drawn.name}.svg",
    "image": markupsafe.Markup(image),
  }


def _inline(svg: str, prefix: str, alt: str) -> str:
  """An SVG file as a part of the page: its own ids, the page's colours, no links."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
  svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
  svg = re.sub(r'\bid="', f'id="{prefix}', svg)
  svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}', svg)
  svg = svg.replace("url(#", f"url(#{prefix}")
  for color, variable in style.THEME_COLOURS.items():
    svg = re.sub(re.escape(color), f"var({variable})", svg, flags=re.IGNORECASE)
  head, body = svg.split(">", 1)
  (box,) = re.findall(r'viewBox="[^"]*"', head)
  return f'<svg role="img" aria-label="{html.escape(alt)}" {box}>{body}'
