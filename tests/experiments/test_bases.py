"""Several frozen networks: the grid, differences and means by hand, what is committed follows."""

import numpy as np
import pandas as pd
import pytest
import study_of
from scipy import stats

from configs import bases as config
from configs import regression
from experiments import committed
from experiments.studies import bases as analysis
from qlora_jax import sweeps
from qlora_jax.models import mlp
from qlora_jax.training import progress
from qlora_jax.workloads import regression as regression_workload
from qlora_jax.workloads import regression_config

RESULTS = committed.results("bases")


def test_every_network_has_both_methods_at_every_rate():
  points = pd.DataFrame(config.get_hyper(sweeps))
  by = ["pretrain.seed", "data.task"]
  counts = points.groupby(by)["adapter.name"].agg(["size", "nunique"])
  assert (counts["size"] == 14).all() and (counts["nunique"] == 2).all()
  assert len(counts) == 10 * len(config.SEEDS) and config.SEEDS[0] == 0
  # Tasks, levels, rates and seeds are the main study's.
  main = pd.DataFrame(regression.get_hyper(sweeps))
  level = main[main["data.noise_level"].isin((0.0, 0.5))].groupby("data.task")["data.noise_level"]
  ours = points.groupby("data.task")["data.noise_level"].first()
  assert ours.drop("regimes").equals(level.first()[ours.drop("regimes").index])
  assert set(points["optimizer.learning_rate"]) == set(main["optimizer.learning_rate"])
  assert config.get_config().protocol == regression.get_config().protocol
  assert all(abs(count / 8192 - 1) <= 0.02 for *_, count, _ in study_of.settings_of(config))


def test_the_seed_gives_another_network_and_0_the_main_studys(tmp_path):
  base = regression.get_config("runlocal")
  base.pretrain.steps = 5
  found = {}
  for seed in (0, 1):
    base.pretrain.seed = seed
    with progress.Display(total_trials=1) as display:
      trained = regression_workload.Resources(tmp_path, display).base(base)
    model = mlp.MLPConfig(**base.model)
    found[seed] = np.concatenate([np.ravel(leaf) for leaf in _leaves(trained)])
    assert len(found[seed]) == sum(
      leaf.size for leaf in _leaves(regression_config.random_base(model, 0))
    )
  assert np.abs(found[0] - found[1]).mean() > 0.01
  assert len(list((tmp_path / "bases").iterdir())) >= 2  # neither is taken for the other


def _leaves(tree):
  import jax

  return jax.tree.leaves(tree)


def made_up(errors):
  """Rows of a study; `errors` has (task, method, network) -> the error of a seed 1."""
  found, rng = [], np.random.default_rng(0)
  scale = np.exp(0.1 * rng.normal(size=10))
  for (task, method, base), error in errors.items():
    clean = task not in regression.TABLES
    for stage, seeds in (("search", (0,)), ("final", range(100, 110))):
      for place, seed in enumerate(seeds):
        value = error * scale[place] * (1 + 0.001 * rng.normal())
        found.append(
          {
            "stage": stage,
            "task": task,
            "seed": seed,
            "arm": config.label(method, base),
            "learning_rate": 0.01 * base,
            "rank": 7,
            "atoms": 9,
            "trainable_params": 8192,
            "diverged": False,
            "router/effective_support": 2.0,
            "test_mse": value if clean else np.nan,
            "test_noisy_mse": value,
          }
        )
  return pd.DataFrame(found)


def test_networks_are_compared_one_by_one_and_then_as_one_sample():
  ratios, errors = {"regimes": (0.8, 0.82, 0.84), "bikeshare": (0.8, 1.3, 1.0)}, {}
  for task, own in ratios.items():
    for base, ratio in enumerate(own, start=1):
      errors[task, "lora", base] = float(base)
      errors[task, "queryable", base] = base * ratio
  errors["regimes", "queryable", 4] = 1.0  # whose LoRA is not trained yet
  found = analysis.differences(made_up(errors))
  assert list(found["task"]) == ["regimes"] * 3 + ["bikeshare"] * 3
  assert found["percent"].to_numpy() == pytest.approx([-20, -18, -16, -20, 30, 0], abs=0.2)
  assert (found["percent_low"] < found["percent"]).all()
  assert found["learning_rate"].tolist() == pytest.approx([0.01, 0.02, 0.03] * 2)
  pooled = analysis.pooled(found).set_index("task")
  for task, own in ratios.items():
    logs, row = np.log(own), pooled.loc[task]
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    expected = 100 * np.expm1([logs.mean(), low, high])
    assert row[["percent", "percent_low", "percent_high"]].tolist() == pytest.approx(
      expected.tolist(), abs=0.4
    )
    assert row["scatter"] == pytest.approx(100 * np.std(logs, ddof=1), abs=0.2)
    assert row["scatter"] > 10 * row["by_seeds"]  # seeds were made to agree
  assert pooled["verdict"].to_dict() == {"regimes": "better", "bikeshare": "not significant"}


def test_the_main_studys_network_is_one_of_the_sample_at_the_others_noise():
  others = made_up({("regimes", name, 1): 1.0 for name in ("lora", "queryable")})
  others["noise_level"] = 0.5
  again = made_up({("regimes", "lora", 7): 2.0, ("regimes", "queryable", 7): 1.0})
  again["arm"] = again["arm"].str.removesuffix("/7")
  quiet = again.assign(noise_level=0.0, test_mse=100.0)
  both = pd.concat([again.assign(noise_level=0.5), quiet])
  found = analysis.differences(analysis.with_main_network(others, both)).set_index("base")
  assert list(found.index) == [0, 1]
  assert found["percent"].tolist() == pytest.approx([-50, 0], abs=0.2)
  trained = others.assign(arm=others["arm"].str.replace("/1", "/0"))
  assert analysis.with_main_network(trained, both) is trained


def test_bikeshare_over_six_networks_by_hand():
  logs = []
  for name, suffix in (("stability", ""), *(("bases", f"/{base}") for base in config.SEEDS[1:])):
    runs = pd.read_parquet(committed.RESULTS / name / "results.parquet")
    runs = runs[(runs["task"] == "bikeshare") & (runs["stage"] == "final")]
    errors = runs.groupby("arm")["test_noisy_mse"].mean()
    logs.append(np.log(errors[f"queryable{suffix}"] / errors[f"lora{suffix}"]))
  low, high = stats.t.interval(0.95, 5, np.mean(logs), stats.sem(logs))
  expected = 100 * np.expm1([np.mean(logs), low, high])
  pooled = RESULTS.table("pooled.csv").set_index("task").loc["bikeshare"]
  assert pooled["bases"] == 6 and pooled["verdict"] == "not significant"
  assert pooled[["percent", "percent_low", "percent_high"]].tolist() == pytest.approx(
    expected.tolist(), rel=1e-3
  )


def test_what_is_committed_follows_from_the_committed_runs(tmp_path):
  files = ["differences.csv", "pooled.csv", "summary.md"]
  target = study_of.check_derived_files("bases", tmp_path, files)
  found = pd.read_csv(target / "differences.csv")
  assert len(found) == 10 * len(config.SEEDS) and (found["seeds"] == 10).all()


def test_intervals_quoted_on_the_page_are_the_tables():
  study_of.check_quotes(study_of.page_of("bases"), "bases")


def test_the_front_page_quotes_the_significant_tasks():
  page = " ".join((committed.ROOT / "README.md").read_text().split())
  pooled = RESULTS.table("pooled.csv")
  clear = pooled[pooled["verdict"] != "not significant"]
  assert len(clear) == 3
  for row in clear.itertuples():
    ends = (f"{x:+.1f}" for x in (row.percent, row.percent_low, row.percent_high))
    assert "{} % [{}, {}]".format(*ends).replace("-", "−") in page, row.task


def test_a_second_training_stands_beside_the_first_of_the_same_comparison():
  rows = analysis.repeated(RESULTS).set_index("task")
  assert len(rows) == 10
  for study_name, suffix in (("regression", ""), ("stability", "_2")):
    runs = pd.read_parquet(committed.RESULTS / study_name / "results.parquet")
    own = runs[(runs["task"] == "regimes") & (runs["noise_level"] == 0.5)]
    own = own[own["stage"] == "final"].groupby("arm")
    errors, rates = own["test_mse"].mean(), own["learning_rate"].first()
    percent = 100 * (errors["queryable"] / errors["lora"] - 1)
    assert rows.loc["regimes", f"relative{suffix}"] == pytest.approx(percent)
    assert rows.loc["regimes", f"baseline_rate{suffix}"] == rates["lora"]


def test_the_gain_is_measured_at_the_rates_that_the_searches_chose():
  chosen = RESULTS.table("differences.csv").set_index(["task", "base"])["learning_rate"]
  points = config.get_hyper(sweeps, "gain")
  assert {(p["data.task"], p["pretrain.seed"]): p["optimizer.learning_rate"] for p in points} == {
    key: rate for key, rate in chosen.items() if key[0] in config.CHOSEN
  }
  pooled = RESULTS.table("pooled.csv")
  assert set(config.CHOSEN) == set(pooled[pooled["verdict"] != "not significant"]["task"])


def test_the_trials_of_the_gain_repeat_the_errors_of_the_searched_ones():
  """Another machine rounds differently: the means over ten seeds agree within a few per cent."""
  again = (
    committed.results(analysis.GAIN_STUDY).study.stage("final").groupby(["task", "arm"])["score"]
  )
  errors = RESULTS.table("differences.csv").set_index(["task", "base"])["error"]
  for (task, method), error in again.mean().items():
    assert abs(error / errors[task, int(method.split("/")[1])] - 1) < 0.08


def test_the_table_of_gains_has_means_and_intervals_over_the_networks():
  (row,) = analysis.routed(RESULTS).query("task == 'regimes'").to_dict("records")
  final = committed.results(analysis.GAIN_STUDY).study.stage("final").query("task == 'regimes'")
  column = "routing/gain_uniform"
  means = final.groupby("arm")[column].mean()
  assert len(means) == row["networks"] == 6 and row["trials"] == 60
  np.testing.assert_allclose(row[f"{column}mean"], means.mean())
  assert means.min() <= row[f"{column}low"] < row[f"{column}mean"] < row[f"{column}high"]
  assert f"{row['error']:.3f}" in analysis.gain_table(RESULTS)
