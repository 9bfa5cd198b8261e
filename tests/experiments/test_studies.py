"""Every study has a notebook that runs, and the committed figures are those of the results."""

import pathlib

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments import __main__ as command
from experiments import committed, figures, notebooks, study
from experiments.analysis import language_tables
from experiments.studies import language_accuracy, regression_error, stability
from qlora_jax.studies import stability as evaluation_stability

ROOT = pathlib.Path(__file__).parents[2]
RECORDS = study.registry()
READY = [name for name, record in RECORDS.items() if record.committed_results.exists]
MAIN, INDUCTION = committed.results("regression"), committed.results("induction")


def notebook(name):
  return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """The outputs by notebook, and the folder of their figures.

  One kernel runs them all, emptied before each, so that imports and summaries are there once.
  """
  folder, joined = tmp_path_factory.mktemp("figures"), nbformat.v4.new_notebook()
  for name in READY:
    cells = [nbformat.v4.new_code_cell("%reset -f"), *notebook(name).cells]
    for number, cell in enumerate(cells):
      cell["id"], cell.metadata["notebook"] = f"{name.replace('_', '-')}-{number}", name
    joined.cells += cells
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("QLORA_JAX_FIGURES", str(folder))
    patch.setenv("PYTHONPATH", str(ROOT))
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(joined, timeout=300, resources=resources).execute()
  shown = {name: [] for name in READY}
  for cell in joined.cells:
    shown[cell.metadata["notebook"]] += cell.get("outputs", [])
  return shown, folder


@pytest.mark.parametrize("name", READY)
def test_a_notebook_runs_and_draws_the_committed_figure(name, executed):
  shown, folder = executed
  kinds = [kind for output in shown[name] for kind in output.get("data", {})]
  assert "image/png" in kinds and kinds.count("text/markdown") >= 2
  expected = ROOT / "docs" / "figures" / f"{name}.svg"
  assert (folder / f"{name}.svg").read_bytes() == expected.read_bytes(), "run make figures"


def test_every_study_has_the_notebook_of_the_template_without_outputs():
  texts = notebooks.files()
  assert set((ROOT / "notebooks").glob("*.ipynb")) == set(texts)
  for path, text in texts.items():
    assert path.read_text() == text, "run python -m experiments notebooks"
    assert not any(cell.get("outputs") for cell in notebook(path.stem).cells), path
    nbformat.validate(notebook(path.stem))


def test_captions_are_those_of_the_figures_that_are_there(tmp_path):
  folder = ROOT / "docs" / "figures"
  for name in figures.captions():
    if (folder / f"{name}.png").is_file():
      (tmp_path / f"{name}.png").touch()
      assert (folder / f"{name}.svg").is_file(), name
  figures.write_index(tmp_path)
  assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


def test_an_unknown_figure_is_one_line_and_exit_code_2(capsys):
  assert command.main(["figures", "nothing"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: figure 'nothing' is unknown; use one of regression_error")


def test_a_drawing_has_no_date(tmp_path):
  path = tmp_path / "a.svg"
  path.write_text("<svg>\n  <dc:date>2026-01-01</dc:date>\n  <g/>  \n</svg>\n")
  figures.strip_date(path)
  assert path.read_text() == "<svg>\n  <g/>\n</svg>\n"


def test_stability_is_counted_from_the_runs():
  main, rows = MAIN.study, stability.by_method(MAIN).set_index("arm")
  own = main.stage("search")
  own = own[own["arm"] == "queryable"]
  assert rows.loc["queryable", "search_runs"] == len(own)
  assert rows.loc["queryable", "diverged"] == pytest.approx(own["diverged"].mean())
  errors = main.stage("final")
  errors = errors[(errors["task"] == "regimes") & (errors["noise_level"] == 0.0)]
  errors = errors.pivot(index="seed", columns="arm", values="test_mse")
  pair = stability.pairs(MAIN).set_index("setting").loc["regimes, noise 0"]
  assert pair["spread_ratio"] == pytest.approx(errors["queryable"].std() / errors["lora"].std())
  uniform = main.results[main.results["arm"] == "uniform"]["trial_id"]
  curves = main.curves[main.curves["trial_id"].isin(uniform)].sort_values(["trial_id", "step"])
  spikes = sum(
    int(evaluation_stability.loss_spikes(losses.to_numpy()))
    for _, losses in curves.groupby("trial_id")["train_loss"]
  )
  assert rows.loc["uniform", "spikes"] == spikes > 0


@pytest.mark.parametrize("name", list(language_accuracy.PAIRS))
def test_a_pair_of_methods_is_the_committed_runs_averages(name):
  final = pd.read_parquet(committed.RESULTS / name / "results.parquet").query("stage == 'final'")
  nats = final.pivot(index="seed", columns="arm", values="test_nats")
  lora, routed = sorted(nats.columns, key=lambda name: not name.startswith("lora"))
  base, first, second = language_tables.pair(committed.results(name)).to_dict("records")
  assert base["test_nats"] == pytest.approx(final["base_test_nats"].mean())
  assert first["test_nats"] == pytest.approx(nats[lora].mean()) and first["seeds"] == 3
  differences = nats[routed] - nats[lora]
  assert second["test_nats_difference"] == pytest.approx(differences.mean())
  low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
  assert (second["test_nats_low"], second["test_nats_high"]) == pytest.approx((low, high))
  assert second["test_accuracy"] == pytest.approx(
    100 * final[final["arm"] == routed]["test_accuracy"].mean()
  )


def test_what_the_prior_carries_is_the_paired_difference_of_the_committed_runs():
  runs = pd.read_parquet(committed.RESULTS / "induction" / "results.parquet")
  final = runs[(runs["stage"] == "final") & ~runs["in_prompt"]]
  way = final["arm"] + final["shuffled"].map({True: " shuffled", False: ""})
  scores = 100 * final.assign(way=way).pivot(index="seed", columns="way", values="test_accuracy")
  assert len(scores) == 3
  claim_list = language_accuracy.claims(INDUCTION)
  claims = {claim.claim: (claim.verdict, claim.evidence) for claim in claim_list}
  verdict, told = claims["the prior carries an instruction that the prompt does not hold"]
  lows = []
  for other in ("queryable", "queryable_prior shuffled"):
    differences = scores["queryable_prior"] - scores[other]
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    signed = [f"{x:+.1f}".replace("-", "−") for x in (differences.mean(), low, high)]
    assert f"({signed[0]} [{signed[1]}, {signed[2]}]" in told
    lows.append(low)
    for page in ("README.md", "docs/language_results.md"):
      text = " ".join((ROOT / page).read_text().split()).replace("-", "−")
      quoted = f"{signed[0]} points [{signed[1]}, {signed[2]}]"
      assert other != "queryable" or quoted in text, page
  assert (verdict == "supported") == (min(lows) > 0)


def test_wins_and_losses_are_those_that_hold_after_holms_correction():
  rows, number = regression_error.against_lora(MAIN), regression_error.corrected(MAIN)
  clear = (rows["relative_low"] > 0) | (rows["relative_high"] < 0)
  assert number == (len(rows), clear.sum(), (clear & (rows["p_holm"] < 0.05)).sum())
  page = " ".join((ROOT / "README.md").read_text().split())
  assert (
    "of {} comparisons, {} uncorrected intervals leave out zero, and {} after".format(*number)
    in page
  )
  counted = [line.split("|")[3:6] for line in regression_error.counts(MAIN).splitlines()[2:]]
  wins, ties, losses = np.array(counted, int).sum(axis=0)
  assert (wins + losses, wins + ties + losses) == (number[2], number[0])


def test_ten_search_cells_with_the_prompt_are_as_the_pages_say():
  lower, at_high = [], {}
  for name in ("induction", "all_tasks", "gsm8k"):
    runs = pd.read_parquet(committed.RESULTS / name / "results.parquet")
    runs = runs[(runs["stage"] == "search") & runs["in_prompt"]]
    nats = runs.pivot(index="learning_rate", columns="arm", values="validation_nats")
    ours = next(name for name in nats if name.startswith("queryable"))
    lower += list(nats[ours] < nats["lora"])
    at_high[name] = (nats["lora"] - nats[ours])[0.01]
    assert nats[ours].idxmin() == nats["lora"].idxmin() == 0.003
  assert len(lower) == 10 and sum(lower) == 9
  assert (at_high["induction"], at_high["all_tasks"]) == pytest.approx((0.1, 0.07), abs=0.005)


def test_a_page_of_the_language_studies_quotes_the_swap_test():
  rows = pd.read_csv(committed.RESULTS / "induction" / "swap.csv").iloc[0]
  runs = pd.read_parquet(committed.RESULTS / "induction" / "results.parquet")
  run = runs[(runs["arm"] == "queryable_prior") & runs["in_prompt"] & (runs["seed"] == 100)]
  assert run["validation_nats"].item() == pytest.approx(rows["nats"], abs=5e-5)
  assert run["router/effective_support"].item() == pytest.approx(rows["support_end"], abs=5e-3)
  pages = (
    "README.md",
    "docs/results.md",
    "docs/language_results.md",
    "docs/studies/factorial.md",
  )
  for page in pages:
    text = (ROOT / page).read_text()
    for name in ("nats", "nats_uniform", "nats_permuted"):
      assert f"{rows[name]:.4f}" in text, (page, name)
    assert f"{rows['support_start']:.2f}" in text and f"{rows['support_end']:.2f}" in text, page


def test_loss_spikes_are_counted_from_the_recorded_losses():
  rows = stability.spikes(MAIN)
  again = committed.results("stability").study
  for side, method in (("theirs", "lora"), ("ours", "queryable")):
    runs = again.results[(again.results["task"] == "regimes") & (again.results["arm"] == method)]
    curves = again.curves[again.curves["trial_id"].isin(runs["trial_id"])]
    counted = sum(
      int(evaluation_stability.loss_spikes(own.sort_values("step")["train_loss"].to_numpy()))
      for _, own in curves.groupby("trial_id")
    )
    assert rows.loc["regimes", ("sum", side)] == counted > 0
    assert rows.loc["regimes", ("count", side)] == len(runs) == 31
  ours, theirs = (rows["sum", side].sum() for side in ("ours", "theirs"))
  assert f"({ours:.0f} against {theirs:.0f} in 310 runs each)" in (ROOT / "README.md").read_text()


def test_the_combined_changes_are_compared_with_the_pairs_lora():
  runs = [
    pd.read_parquet(committed.RESULTS / study / "results.parquet").query("stage == 'final'")
    for study in ("induction", "combined")
  ]
  lora = runs[0][(runs[0]["arm"] == "lora") & runs[0]["in_prompt"]].set_index("seed")
  ours = runs[1].set_index("seed")
  assert list(ours.index) == list(lora.index) == [100, 101, 102]
  differences = ours["validation_nats"] - lora["validation_nats"]
  low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
  mean, low, high = (f"{x:+.3f}".replace("-", "−") for x in (differences.mean(), low, high))
  row = language_tables.combined(INDUCTION).strip().splitlines()[-1]
  assert f"| {ours['validation_nats'].mean():.3f} ({mean} [{low}, {high}]) |" in row
  assert f"| {100 * ours['test_accuracy'].mean():.1f} (" in row


def test_without_arguments_the_command_lists_every_study(capsys):
  assert command.main([]) == 0
  lines = capsys.readouterr().out.splitlines()[2:]
  expected = [f"| {record.name} | {record.question} | yes |" for record in RECORDS.values()]
  assert lines == expected
  assert all(record.question.endswith("?") for record in RECORDS.values())


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["nothing"], "'nothing' is no study and no command"),
    (["ablations", "--nothing"], "unrecognized arguments: --nothing"),
    (["depth", "--limit=many"], "--limit"),
    (["depth", "--workdir=runs/x", "--config=configs/missing.py"], "cannot be read"),
    (["noise_and_rows", "--results=runs/missing"], "has no results.parquet"),
    (["keep", "--from=runs/missing"], "--from and --results: give both"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys):
  assert command.main(arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and words in line


def test_names_of_studies_tables_and_figures_are_unique_and_those_of_the_files():
  modules = {path.stem for path in (ROOT / "experiments" / "studies").glob("[!_]*.py")}
  assert set(RECORDS) == modules
  tables = [name for record in RECORDS.values() for name in record.tables]
  drawn = [name for record in RECORDS.values() for name in (record.name, *record.report_figures)]
  assert len(set(tables)) == len(tables) and len(set(drawn)) == len(drawn)
  for record in RECORDS.values():
    assert not record.config or (ROOT / record.config.partition(":")[0]).is_file()
