"""The report as one HTML file that asks the network for nothing."""

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

from experiments.report import headline, inputs, panels, style, tables

_MOST_SVG_BYTES = 2_500_000  # a larger drawing goes in as PNG
_MARKS = {"better": "▼", "worse": "▲", "no difference": "○", "diverged": "✕"}

# (heading, what it is, summary column, formatter); `None` for text.
_COLUMNS = (
  ("Data set", "task, and the noise where a task has several", "setting", None),
  ("Method", "see the list of methods below", "label", None),
  ("Trainable", "parameters that training changes", "trainable_params", tables.count),
  ("Learning rate", "chosen by the search", "learning_rate", tables.plain),
  ("Test MSE", "mean over seeds [95 % interval]", "test_mse", tables.number),
  ("Compared with", "the method that the difference is taken to", "baseline_label", None),
  ("Difference", "paired difference in test MSE [95 % interval]", "difference",
   lambda value: tables.signed(value, 2)),
  ("Difference, %", "the same in percent of the other's error", "relative", tables.percent),
  ("Verdict", "whether the interval leaves out zero", "verdict", None),
  ("p", "chance of such a difference without a true one, corrected (Holm)", "p_holm",
   lambda value: tables.number(value, 2)),
  ("Spread", "standard deviation of the test MSE over seeds", "spread", tables.number),
  ("Basin", "decades of learning rate within 5 % of the best", "basin_decades",
   lambda value: tables.number(value, 2)),
  ("Diverged", "share of search runs that diverged", "diverged_share", tables.share),
)  # fmt: skip


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
  stability = ("curves", "learning_rates")
  own = headline.compared(summary)
  subjects = set(zip(own["task"], own["method"], strict=True))
  one_baseline = summary["baseline"].nunique() < 2
  columns = [c for c in _COLUMNS if not (one_baseline and c[2] == "baseline_label")]
  return template.render(
    info=study.info,
    facts=_facts(study),
    headline=headline.write(summary),
    glance=_glance(summary),
    columns=[{"name": n, "hint": hint, "text": f is None} for n, hint, _, f in columns],
    rows=[
      _row(row, columns, (row["task"], row["method"]) in subjects)
      for row in summary.to_dict("records")
    ],
    settings=list(dict.fromkeys(summary["setting"])),
    result_figures=[f for f in figures if f["name"] not in stability],
    stability_figures=[f for f in figures if f["name"] in stability],
    absent=absent,
    stability=_stability(summary),
    routers=_routers(summary),
    methods=[style.method(m) for m in style.ordered(summary["method"])],
    protocol=_protocol(study, summary),
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
  if not isinstance(seconds, int | float) or not math.isfinite(seconds):
    return ""
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _glance(summary: pd.DataFrame) -> dict | None:
  """One line a data set: the study's subject, its baseline, and the best method."""
  own = headline.compared(summary)
  if own.empty:
    return None
  rows = []
  for row in own.to_dict("records"):
    here = summary[(summary[inputs.SETTING] == [row[c] for c in inputs.SETTING]).all(axis=1)]
    other = here[here["method"] == row["baseline"]].iloc[0]
    finished = here[np.isfinite(here["test_mse"]) & (here["failed_runs"] == 0)]
    best = finished.nsmallest(1, "test_mse").to_dict("records")
    rows.append({
      "setting": row["setting"],
      "method": row["label"],
      "base": tables.number(row["base_mse"]),
      "baseline": style.method(row["baseline"]).label,
      "other": _interval(other, "test_mse", tables.number),
      "own": _interval(row, "test_mse", tables.number),
      "relative": _interval(row, "relative", tables.percent),
      "verdict": row["verdict"],
      "best": f"{best[0]['label']}, {tables.number(best[0]['test_mse'])}" if best else "",
    })  # fmt: skip
  several = own[["method", "baseline"]].drop_duplicates().shape[0] > 1
  return {
    "subject": "Its test MSE" if several else style.method(own["method"].iloc[0]).label,
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


def _stability(summary: pd.DataFrame) -> list[dict]:
  """One line a method over all data sets."""
  rows = []
  own = summary.drop_duplicates([*inputs.SETTING, "method"])
  for key in style.ordered(own["method"]):
    of = own[own["method"] == key]
    searched = of["search_runs"].sum()
    diverged = (of["diverged_share"] * of["search_runs"]).sum() / searched if searched else math.nan
    basins = of["basin_decades"].dropna()
    failed, finals = int(of["failed_runs"].sum()), int(of["num_seeds"].sum())
    rows.append({
      "label": style.method(key).label,
      "searched": int(searched),
      "diverged": tables.share(diverged),
      "basin": tables.number(basins.median(), 2) if len(basins) else tables.MISSING,
      "narrowest": tables.number(basins.min(), 2) if len(basins) else tables.MISSING,
      "spread": tables.number(100 * (of["spread"] / of["test_mse"]).median(), 2),
      "failed": f"{failed} of {finals}",
    })  # fmt: skip
  return rows


def _routers(summary: pd.DataFrame) -> dict | None:
  """Means of the router's measurements over data sets, for the methods that have one."""
  own = summary.drop_duplicates([*inputs.SETTING, "method"])
  columns = [c for c in inputs.ROUTER_COLUMNS if own[c].notna().any()]
  if not columns:
    return None
  means = own.groupby("method")[columns].mean().dropna(how="all")
  return {
    "columns": [inputs.ROUTER_COLUMNS[c] for c in columns],
    "rows": [
      [style.method(m).label, *(tables.number(means.loc[m, c], 2) for c in columns)]
      for m in style.ordered(means.index)
    ],
  }


def _protocol(study: inputs.Study, summary: pd.DataFrame) -> list[str]:
  """What was done, from the data itself."""
  search, final = study.stage("search"), study.stage("final")
  lines = []
  if len(search):
    rates = sorted(search["learning_rate"].dropna().unique())
    per_point = search.groupby([*inputs.SETTING, "method", "learning_rate"], dropna=False).size()
    lines.append(
      f"Search: every method was trained at each of {len(rates)} learning rates "
      f"({', '.join(f'{rate:g}' for rate in rates)}) with {headline.seeds(per_point)}. The rate "
      "with the lowest mean validation error was chosen, for each method and data set by itself."
    )
  per_method = final.groupby([*inputs.SETTING, "method"]).size()
  lines.append(
    f"Final runs: the chosen rate with {headline.seeds(per_method)} that the search had not used. "
    "The same seed gives every method the same data in the same order, so that differences are "
    "taken seed by seed."
  )
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
