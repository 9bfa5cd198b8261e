"""A synthetic study on disk, seeded, with known winners, ties and losers."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest

# Error relative to LoRA, trainable parameters, and how fast a large learning rate hurts.
METHODS = {
  "none": (2.6, 0, 0.0),
  "full": (0.85, 66_000, 0.2),
  "lora": (1.0, 8192, 1.0),
  "lora_input": (0.95, 9216, 1.0),
  "rslora": (1.0, 8192, 1.2),
  "dora": (0.98, 8704, 0.8),
  "lora_xs": (1.25, 1024, 0.5),
  "comol": (1.02, 9100, 0.9),
  "lily": (0.96, 7800, 0.7),
  "queryable": (0.88, 7288, 0.4),
  "queryable_prior": (0.86, 7544, 0.5),
  "queryable_kl": (0.89, 7544, 0.5),
  "queryable_query": (0.87, 7800, 0.5),
  "queryable_topk": (0.97, 7288, 0.6),
  "queryable_recurrent": (0.9, 7360, 0.5),
  "queryable_no_summary": (0.91, 7100, 0.5),
  "static": (1.28, 6900, 0.4),
  "uniform": (1.35, 6800, 0.4),
}
TASKS = (
  "regimes",
  "multi_target",
  "bikeshare",
  "friedman_2",
  "piecewise",
  "periodic",
  "interactions",
  "heavy_tails",
  "energy",
  "protein",
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def write_study(
  workdir,
  tasks=TASKS[:3],
  methods=("none", "lora", "queryable", "static"),
  seeds=3,
  levels=(0.3,),
  search_seeds=2,
  steps=1000,
  factors=None,
  failures=(),
):
  """Writes a study; returns its results.

  `factors` overrides a method's error relative to LoRA; `failures` lists (method, seed) whose
  final runs diverge.
  """
  rng = np.random.default_rng(0)
  results, curves, routing = [], [], []
  for number, (task, level) in enumerate(itertools.product(tasks, levels)):
    best = 0.05 * (1 + 0.6 * number / len(levels)) * (0.5 + 2 * level)
    luck = rng.normal(0, 0.08, size=100)  # once a seed: shared by the methods, as the data is
    for method in methods:
      factor = (factors or {}).get(method, METHODS[method][0] * (1 + rng.normal(0, 0.05)))
      runs = [("search", s, r) for s in range(search_seeds) for r in RATES]
      runs = [run for run in runs if method != "none" or run[2] == RATES[2]]
      runs += [("final", 50 + s, RATES[2]) for s in range(seeds)]
      for stage, seed, rate in runs:
        mse = best * factor * np.exp(luck[seed] + rng.normal(0, 0.03)) * _penalty(method, rate)
        if (stage == "final" and (method, seed) in failures) or (
          stage == "search" and mse > 9 * best
        ):
          mse = np.nan
        row = _result(task, level, method, stage, seed, rate, mse, 2.6 * best, steps)
        results.append(row)
        curves += _curve(rng, row) if stage == "final" else []
      if method in ("queryable", "static") and level == levels[0]:
        routing += _routing(rng, task, method)
  workdir.mkdir(parents=True, exist_ok=True)
  results = pd.DataFrame(results)
  results.to_parquet(workdir / "results.parquet")
  results.to_csv(workdir / "results.csv", index=False)
  pd.DataFrame(curves).to_parquet(workdir / "curves.parquet")
  if routing:
    pd.DataFrame(routing).to_parquet(workdir / "routing.parquet")
  info = {
    "title": "Noisy regression <small>",
    "commit": "0123abc",
    "date": "2026-01-02",
    "command": "python launch.py --config=configs/regression.py --workdir=runs/study",
    "devices": "NVIDIA H200",
    "versions": {"jax": "0.10.2", "flax": "0.12.0"},
    "wall_seconds": 812.4,
    "config": {"optimizer": {"schedule": "cosine"}, "steps": steps},
  }
  (workdir / "study.json").write_text(json.dumps(info))
  return results


def _penalty(method, rate):
  """Factor on the error away from the best rate, 1e-2; a fragile method diverges at 1e-1."""
  miss, fragile = np.log10(rate / RATES[2]), METHODS[method][2]
  if miss > 0.9 and fragile > 0.9:
    return 100.0
  return 1 + 0.15 * miss**2 + 1.5 * fragile * max(miss, 0) ** 2


def _result(task, level, method, stage, seed, rate, mse, base_mse, steps):
  routed = method.startswith(("queryable", "static", "uniform"))
  return {
    "trial_id": f"{stage}-{task}-{level:g}-{method}-{rate:g}-{seed}",
    "stage": stage,
    "task": task,
    "noise_kind": "own" if task == "bikeshare" else "student",
    "noise_level": level,
    "arm": method,
    "family": method.split("_")[0],
    "seed": seed,
    "learning_rate": rate,
    "rank": 8,
    "atoms": 16,
    "top_k": 0,
    "trainable_params": METHODS[method][1],
    "steps": steps,
    "train_loss": mse + level**2,
    "validation_mse": mse * 1.02,
    "base_mse": base_mse,
    "test_mse": np.nan if task == "bikeshare" else mse,
    "test_noisy_mse": mse + level**2,
    "diverged": bool(np.isnan(mse)),
    "seconds": 3.2,
    "router/effective_support": 6.1 if routed else np.nan,
    "router/entropy": 1.8 if routed else np.nan,
    "router/max_share": 0.31 if routed else np.nan,
    "bound/certified": 2.4 if routed else np.nan,
    "bound/measured": 0.7 if routed else np.nan,
    **_gains(routed, 0.03 * (seed % 7)),
  }


def _gains(routed, luck):
  """What routing gains by: much over equal weights, nothing over the block's mean weights."""
  gains = {"routing/gain_uniform": 0.5, "routing/gain_mean": -0.09, "routing/gain_other": 0.2}
  moved = {"routing/support_start": 5.0, "routing/moved_weights": 0.25, "routing/moved_atoms": 1.5}
  return {
    **{name: gain + luck if routed else np.nan for name, gain in gains.items()},
    **{name: value if routed else np.nan for name, value in moved.items()},
  }


def _curve(rng, row):
  steps = np.linspace(row["steps"] / 20, row["steps"], 20).astype(int)
  left = np.exp(-6 * steps / row["steps"])  # share of the way that is still to go
  mse = row["validation_mse"] * (1 - left) + row["base_mse"] * left
  mse = mse * (1 + rng.normal(0, 0.02, size=20))
  return [
    {
      "trial_id": row["trial_id"],
      "step": step,
      "train_loss": value,
      "validation_mse": value,
      "routing/gain_uniform": row["routing/gain_uniform"] * step / row["steps"],
    }
    for step, value in zip(steps, mse, strict=True)
  ]


def _routing(rng, task, method):
  targets = ("sum", "difference", "product", "maximum") if task == "multi_target" else ("y",)
  rows = []
  for (number, target), given in itertools.product(enumerate(targets), (True, False)):
    logits = rng.normal(0, 0.5, (8, 16))
    for block in range(8):
      logits[block, (3 * number + block) % 16] += 3 if given else 0.5
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows += [
      {
        "trial_id": f"final-{task}",
        "task": task,
        "arm": method,
        "target": target,
        "with_instruction": given,
        "block": block,
        "atom": atom,
        "weight": weights[block, atom],
      }
      for block, atom in itertools.product(range(8), range(16))
    ]
  return rows


# A language study: exact match by the way an instruction is used, and its nats at the best rate.
WAYS = {
  ("lora", True, False): (0.66, 0.62),
  ("queryable_prior", True, False): (0.66, 0.61),
  ("lora", False, False): (0.30, 1.60),
  ("queryable", False, False): (0.31, 1.55),
  ("queryable_prior", False, False): (0.43, 1.20),
  ("queryable_prior", False, True): (0.30, 1.62),
}
ANSWERED = ("antonyms", "plural", "translation_en-fr")


def write_language_study(workdir, ways=None, seeds=3, by_task=True, rates=(3e-4, 1e-3, 3e-3)):
  """Writes what a sweep over a language model leaves behind; returns its results.

  `ways` maps (method, in_prompt, shuffled) to its exact match and nats; with the prompt each has
  `seeds` final seeds, without it one, as in `configs/llm.py:induction`.
  """
  rng = np.random.default_rng(0)
  results, curves, samples = [], [], []
  luck = rng.normal(0, 0.01, seeds)  # once a seed: shared by the methods, as the data are
  for (method, in_prompt, shuffled), (accuracy, nats) in (ways or WAYS).items():
    runs = [("search", 0, rate) for rate in rates] if len(rates) > 1 else []
    runs += [("final", 100 + s, rates[len(rates) // 2]) for s in range(seeds if in_prompt else 1)]
    for stage, seed, rate in runs:
      row = {
        "trial_id": f"{stage}-{method}-{in_prompt}-{shuffled}-{rate:g}-{seed}",
        "stage": stage,
        "task": "word_tasks",
        "arm": method,
        "family": method.split("_")[0],
        "seed": seed,
        "learning_rate": rate,
        "rank": 8,
        "atoms": 16,
        "top_k": 0,
        "in_prompt": in_prompt,
        "shuffled": shuffled,
        "trainable_params": 2_440_000,
        "steps": 60,
        "seconds": 3.0,
        "validation_nats": nats * (1 + 0.3 * np.log10(rate / 1e-3) ** 2) + rng.normal(0, 0.01),
      }
      if method != "lora":
        row |= {"router/effective_support": 9.0, "router/entropy": 2.2, "router/max_share": 0.2}
        row["router/effective_support"] += rng.normal()
      if stage == "final":
        row |= _scores(rng, row, accuracy + luck[seed - 100], by_task)
        steps = np.arange(10, 61, 10)
        curves += [
          {"trial_id": row["trial_id"], "step": step, "train_loss": nats + 2 * np.exp(-step / 20)}
          for step in steps
        ]
        samples += [
          {
            "trial_id": row["trial_id"],
            "task": task,
            "instruction": f"Do {task}",
            "prompt": "<b>old",
            "expected": "new",
            "before": None if task == "plural" else "no idea",
            "after": "new",
          }
          for task in ANSWERED
        ]
      results.append(row)
  workdir.mkdir(parents=True, exist_ok=True)
  results = pd.DataFrame(results)
  for name, table in (
    ("results", results),
    ("curves", pd.DataFrame(curves)),
    ("samples", pd.DataFrame(samples)),
  ):
    table.to_parquet(workdir / f"{name}.parquet")
  info = {
    "title": "Queryable LoRA on tiny, word_tasks",
    "commit": "0123abc",
    "date": "2026-01-02",
    "command": "python launch.py --config=configs/llm.py:pair --workdir=runs/llm-pair --sweep",
    "devices": "cpu",
    "versions": {"jax": "0.10.2"},
    "wall_seconds": 812.4,
    "config": {
      "kind": "language",
      "model": {"weights": "tiny", "dtype": "float32"},
      "data": {"name": "word_tasks", "tasks": list(ANSWERED), "length": 128, "train_rows": None},
      "optimizer": {"batch_size": 4},
      "eval": {"examples": 30, "max_tokens": 12},
    },
  }
  (workdir / "study.json").write_text(json.dumps(info))
  return results


def _scores(rng, row, accuracy, by_task):
  base = 0.2 if row["in_prompt"] else 0.05
  found = {"base_test_accuracy": base, "base_test_seen_accuracy": base + 0.01}
  for split, gain in (("test", 0.0), ("test_seen", 0.03)):
    each = np.clip(accuracy + gain + rng.normal(0, 0.02, len(ANSWERED)), 0, 1)
    found[f"{split}_accuracy"] = each.mean()
    for task, value in zip(ANSWERED, each, strict=True) if by_task else ():
      found |= {f"{split}/{task}/accuracy": value, f"base_{split}/{task}/accuracy": base}
  return found


@pytest.fixture(scope="session")
def make_language_study():
  """The function that writes a synthetic study of a language model."""
  return write_language_study


@pytest.fixture(scope="session")
def make_study():
  """The function that writes a synthetic study."""
  return write_study
