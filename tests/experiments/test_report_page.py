"""The report's figures and page: complete, self-contained, escaped, and clear about bad input."""

import html.parser
import json
import re

import pandas as pd
import pytest
from PIL import Image

from experiments import report
from experiments.report import __main__ as command
from experiments.report import figures, inputs, panels, style, tables
from qlora_jax import errors
from qlora_jax.adapters import registry
from qlora_jax.studies import statistics

_FIGURES = {
  "difference",
  "noise",
  "routing",
  "parameters",
  "curves",
  "learning_rates",
  "routing_gain",
}
_VOID = {"meta", "br", "img", "input", "link", "hr"}


@pytest.fixture(scope="module")
def built(tmp_path_factory, make_study):
  """A study with everything in it, reported once."""
  workdir = tmp_path_factory.mktemp("study")
  make_study(workdir, tasks=("regimes", "multi_target"), levels=(0.1, 1.0))
  return workdir, report.write_report(workdir)


class _Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects attributes that could load something."""

  def __init__(self):
    super().__init__()
    self.open, self.references, self.ids = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in _VOID:
      self.open.append(tag)
    self.ids += [value for name, value in attrs if name == "id"]
    self.references += [v for n, v in attrs if n in ("src", "href", "xlink:href", "data", "action")]

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in _VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    if tag in ("p", "li", "dd", "dt", "option"):  # a browser may close these by itself
      while self.open and self.open[-1] != tag:
        self.open.pop()
    assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
    self.open.pop()


def test_the_page_has_what_the_routing_gains_with_intervals_over_the_seeds(built):
  workdir, page = built
  text = page.read_text()
  results = pd.read_parquet(workdir / "results.parquet")
  own = results[(results.stage == "final") & (results.arm == "queryable")]
  own = own[(own.task == "regimes") & (own.noise_level == 0.1)]
  for column in inputs.GAIN_COLUMNS:
    mean, low, high = statistics.student(own[column].to_numpy())[0]
    cell = tables.with_interval(mean, low, high, lambda value: tables.signed(value, 3))
    # Bold where the interval lies above zero: over equal weights, not over mean weights.
    assert (f"<td><b>{cell}</b></td>" in text) == (low > 0)
    assert (f"<td>{cell}</td>" in text) == (low <= 0)
  assert {own[column].mean() > 0 for column in inputs.GAIN_COLUMNS} == {True, False}


def test_every_figure_is_there_and_not_blank(built):
  _, page = built
  directory = page.parent / "figures"
  assert {path.stem for path in directory.glob("*.png")} == _FIGURES
  assert {path.stem for path in directory.glob("*.svg")} == _FIGURES
  for name in _FIGURES:
    with Image.open(directory / f"{name}.png") as image:
      assert image.width >= 800
      assert image.info["dpi"][0] == pytest.approx(200, abs=1)
      assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert "<path" in (directory / f"{name}.svg").read_text()


def test_tables_are_written_and_agree(built):
  _, page = built
  summary = pd.read_parquet(page.parent / "summary.parquet")
  assert len(summary) == 4 * 4
  pd.testing.assert_frame_equal(
    summary, pd.read_csv(page.parent / "summary.csv", keep_default_na=True), check_dtype=False
  )
  assert "## regimes, noise 0.1, compared with LoRA" in (page.parent / "summary.md").read_text()


def test_page_parses_and_loads_nothing(built):
  _, page = built
  text = page.read_text()
  parsed = _Page()
  parsed.feed(text)
  assert parsed.open == []
  assert len(parsed.ids) == len(set(parsed.ids))
  assert parsed.references
  for reference in parsed.references:
    assert reference.startswith(("#", "data:")), reference
    if reference.startswith("#"):
      assert reference[1:] in parsed.ids
  assert not re.search(r"url\((?!#)|@import|<link|<iframe|<script src", text)
  assert "default-src 'none'" in text


def test_page_escapes_and_states_the_study(built):
  _, page = built
  text = page.read_text()
  assert "Noisy regression &lt;small&gt;" in text and "<small>" not in text
  for fact in ("NVIDIA H200", "0123abc", "2026-01-02", "python launch.py --config="):
    assert fact in text
  assert text.count("<figure") == len(_FIGURES)
  assert "Left out." not in text
  numbers = [int(n) for n in re.findall(r"Figure (\d+)\.", text)]
  assert numbers == sorted(numbers)


def test_markup_in_the_data_stays_text(tmp_path, make_study):
  results = make_study(tmp_path, tasks=("regimes",), methods=("lora", "queryable"))
  evil = '<script>alert("x")</script>$\\frac$'
  results["task"] = evil
  results.to_parquet(tmp_path / "results.parquet")
  for name in ("curves", "routing"):
    (tmp_path / f"{name}.parquet").unlink()
  text = report.write_report(tmp_path).read_text()
  assert evil not in text
  assert "&lt;script&gt;" in text
  assert text.count("<script>") == 1


def test_absent_optional_files_are_named_in_one_line_each(tmp_path, make_study, monkeypatch):
  make_study(tmp_path, tasks=("regimes",), methods=("lora", "queryable"))
  (tmp_path / "curves.parquet").unlink()
  (tmp_path / "routing.parquet").unlink()
  study = inputs.read(tmp_path)
  monkeypatch.setattr(figures, "DPI", 50)
  drawn, absent = figures.draw(study, tables.summarize(study), tmp_path / "out")
  assert {item.name for item in drawn} == {"difference", "learning_rates", "parameters"}
  assert [line.split(":")[0] for line in absent] == [
    "Error against noise level",
    "Routing map",
    "Learning curves",
    "Routing gain",
  ]


@pytest.mark.parametrize("name", ["results.parquet", "study.json"])
def test_a_missing_file_is_named_in_one_line(tmp_path, make_study, name, capsys):
  make_study(tmp_path, tasks=("regimes",))
  (tmp_path / name).unlink()
  assert command.main([f"--workdir={tmp_path}"]) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1 and name in message and "Traceback" not in message


@pytest.mark.parametrize(
  "name", ["results.parquet", "study.json", "curves.parquet", "routing.parquet"]
)
def test_a_damaged_file_is_named(tmp_path, make_study, name):
  make_study(tmp_path, tasks=("regimes",))
  (tmp_path / name).write_bytes(b"PAR1 not really")
  with pytest.raises(errors.UserError, match=re.escape(name)):
    inputs.read(tmp_path)


def test_wrong_contents_are_named(tmp_path, make_study):
  results = make_study(tmp_path, tasks=("regimes",), seeds=2)

  def refused(table, match):
    table.to_parquet(tmp_path / "results.parquet")
    with pytest.raises(errors.UserError, match=match):
      inputs.read(tmp_path)

  refused(results.drop(columns=["seed", "test_mse"]), r"lacks the column\(s\) seed, test_mse")
  refused(results[results["stage"] == "search"], "no row with stage 'final'")
  refused(results.assign(stage="train"), "stage 'train'")
  refused(results.assign(seed=7), "share seed 7")
  refused(results.assign(test_mse="good"), "column test_mse must hold numbers")
  refused(results.iloc[:0], "has no rows")
  (tmp_path / "study.json").write_text(json.dumps([1]))
  results.to_parquet(tmp_path / "results.parquet")
  with pytest.raises(errors.UserError, match=r"study\.json: must hold a JSON object"):
    inputs.read(tmp_path)


def test_the_command_refuses_a_baseline_without_method(tmp_path, make_study, capsys):
  make_study(tmp_path, tasks=("regimes",))
  assert command.main([f"--workdir={tmp_path}", "--baseline=regimes="]) == 2
  assert "--baseline" in capsys.readouterr().err
  assert command.main([f"--workdir={tmp_path / 'nowhere'}"]) == 2


def test_methods_of_one_colour_differ_in_line_and_marker():
  looks = [style.method(m) for m in style.ordered(registry.presets())]
  assert len({(look.color, str(look.line)) for look in looks}) == len(looks)
  assert len({look.marker for look in looks}) == len(looks)
  assert style.method("something_new").label == "something_new"


@pytest.mark.parametrize(
  ("low", "high"), [(0.1, 0.17), (0.0285, 0.96), (1e3, 6.6e4), (7e-5, 3.0), (0.2, 0.2001)]
)
def test_log_axes_get_a_few_round_labels_apart(low, high):
  ticks = panels._round_numbers(low, high)
  assert 2 <= len(ticks) <= 6
  assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
  assert len({panels.short(tick) for tick in ticks}) == len(ticks) or high / low < 1.01


def test_intervals_of_two_seeds_that_reach_below_zero_are_drawn(tmp_path, make_study):
  results = make_study(
    tmp_path,
    tasks=("regimes",),
    methods=("lora", "queryable", "lora_xs"),
    seeds=2,
    levels=(0.1, 1.0),
  )
  final = results["stage"] == "final"
  results.loc[final & (results["seed"] % 2 == 0), "test_mse"] *= 2
  results.to_parquet(tmp_path / "results.parquet")
  summary = tables.summarize(inputs.read(tmp_path))
  assert (summary["test_mse_low"] < 0).any()
  assert report.write_report(tmp_path).stat().st_size > 10_000
  drawn, _ = figures.draw(inputs.read(tmp_path), summary, tmp_path / "figures")
  own = next(each for each in drawn if each.name == "parameters")
  low, high = own.figure.axes[0].get_ylim()
  assert 0 < low < summary["test_mse"].min() and summary["test_mse"].max() < high
