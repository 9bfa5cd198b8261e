"""A synthetic study on disk, seeded, with known winners, ties and losers."""

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
  "regimes", "multi_target", "bikeshare", "friedman_2", "piecewise", "periodic",
  "interactions", "heavy_tails", "energy", "protein",
)  # fmt: skip
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def write_study(
  workdir, tasks=TASKS[:3], methods=("none", "lora", "queryable", "static"), seeds=3,
  levels=(0.3,), search_seeds=2, steps=1000, factors=None, failures=(),
):  # fmt: skip
  """Writes a study; returns its results.

  `factors` overrides a method's error relative to LoRA; `failures` lists (method, seed) whose
  final runs diverge.
  """
  rng = np.random.default_rng(0)
  results, curves, routing = [], [], []
  for task_index, task in enumerate(tasks):
    for level in levels:
      best = 0.05 * (1 + 0.6 * task_index) * (0.5 + 2 * level)
      # drawn once a seed: shared by the methods, as the data is
      luck = rng.normal(0, 0.08, size=100)
      for method in methods:
        factor, params, fragile = METHODS[method]
        factor = (factors or {}).get(method, factor)
        factor *= 1 + rng.normal(0, 0.05) if factor != 1 and not factors else 1
        routed = method.startswith(("queryable", "static", "uniform", "comol", "lily"))

        def add(stage, seed, rate):
          miss = np.log10(rate / 1e-2) if method != "none" else 0.0
          mse = best * factor * np.exp(luck[seed] + rng.normal(0, 0.03))
          mse *= 1 + 0.15 * miss**2 + (fragile * 1.5 * max(miss, 0) ** 2)
          diverged = stage == "search" and fragile > 0.9 and miss > 0.9
          diverged |= stage == "final" and (method, seed) in failures
          mse = np.nan if diverged else mse
          run_id = f"{stage}-{task}-{level:g}-{method}-{rate:g}-{seed}"
          results.append({
            "run_id": run_id, "stage": stage, "task": task,
            "noise_kind": "student" if task != "bikeshare" else None, "noise_level": level,
            "method": method, "adapter": method.split("_")[0], "seed": seed,
            "learning_rate": np.nan if method == "none" else rate, "rank": 8, "atoms": 16,
            "top_k": 0, "trainable_params": params, "steps": steps, "train_loss": mse + level**2,
            "validation_mse": mse * 1.02 + level**2 * 0, "base_mse": best * 2.6,
            "test_mse": np.nan if task == "bikeshare" else mse,
            "test_noisy_mse": mse + level**2, "diverged": bool(diverged), "seconds": 3.2,
            "router/effective_support": 6.1 if routed else np.nan,
            "router/entropy": 1.8 if routed else np.nan,
            "router/max_share": 0.31 if routed else np.nan,
            "bound/certified": 2.4 if routed else np.nan,
            "bound/measured": 0.7 if routed else np.nan,
          })  # fmt: skip
          if stage == "final":
            for step in np.linspace(steps / 20, steps, 20).astype(int):
              ease = np.exp(-6 * step / steps)
              value = mse * (1 - ease) + best * 2.6 * ease
              curves.append({
                "run_id": run_id, "step": step, "train_loss": value + level**2,
                "validation_mse": value * (1 + rng.normal(0, 0.02)),
              })  # fmt: skip

        rates = RATES if method != "none" else (RATES[2],)
        for rate in rates:
          for seed in range(search_seeds):
            add("search", seed, rate)
        for seed in range(50, 50 + seeds):
          add("final", seed, 1e-2)
        if method in ("queryable", "static") and level == levels[0]:
          targets = (
            ("sum", "difference", "product", "maximum") if task == "multi_target" else ("y",)
          )
          for target_index, target in enumerate(targets):
            for given in (True, False):
              for block in range(8):
                logits = rng.normal(0, 0.5, 16)
                logits[(3 * target_index + block) % 16] += 3 if given else 0.5
                weights = np.exp(logits) / np.exp(logits).sum()
                routing += [
                  {
                    "run_id": results[-1]["run_id"], "task": task, "method": method,
                    "target": target, "with_instruction": given, "block": block, "atom": atom,
                    "weight": weight,
                  }
                  for atom, weight in enumerate(weights)
                ]  # fmt: skip
  workdir.mkdir(parents=True, exist_ok=True)
  results = pd.DataFrame(results)
  results.to_parquet(workdir / "results.parquet")
  results.to_csv(workdir / "results.csv", index=False)
  pd.DataFrame(curves).to_parquet(workdir / "curves.parquet")
  if routing:
    pd.DataFrame(routing).to_parquet(workdir / "routing.parquet")
  info = {
    "title": "Noisy regression <small>", "commit": "0123abc", "date": "2026-01-02",
    "command": "python launch.py --config=configs/regression.py --workdir=runs/study",
    "devices": "1 x NVIDIA H200", "versions": {"jax": "0.10.2", "flax": "0.12.0"},
    "wall_seconds": 812.4, "config": {"optimizer": {"schedule": "cosine"}, "steps": steps},
  }  # fmt: skip
  (workdir / "study.json").write_text(json.dumps(info))
  return results


@pytest.fixture
def make_study():
  """The function that writes a synthetic study."""
  return write_study
