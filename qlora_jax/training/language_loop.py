"""Groups of fine-tuning runs, one run after another; what `loop.Loop` is to regression."""

import json
import pathlib
import shutil

from qlora_jax.evaluation import routing
from qlora_jax.parallel import processes
from qlora_jax.training import language, loop, metrics, progress, stop

_SPLITS = ("test", "test_seen")


def publish(workdir: pathlib.Path, row: dict) -> pathlib.Path | None:
  """Copies a single run's adapter, and its best step's, to `workdir`; None where none is."""
  run, target = workdir / row["directory"], workdir / language.ADAPTER
  if not (run / language.ADAPTER).is_dir():
    return None
  for name in (language.ADAPTER, language.BEST):
    if (run / name).is_dir():
      shutil.copytree(run / name, workdir / name, dirs_exist_ok=True)
  return target


class Loop:
  """Trains groups of fine-tuning runs in one work directory.

  A search is judged by the likelihood of validation answers; final runs also generate.
  """

  objective = "validation_nats"

  def __init__(self, workdir: pathlib.Path, display: progress.Display):
    self.workdir, self.display = workdir, display

  def finished(self, spec: loop.GroupSpec) -> dict | None:
    """The result that an earlier process stored, or None."""
    path = self._directory(spec) / "result.json"
    return json.loads(path.read_text()) if processes.agreed(path.exists()) else None

  def train(self, spec: loop.GroupSpec) -> dict:
    """Trains a group and stores its result: 'rows' and 'curves' of the study's tables."""
    directory = self._directory(spec)
    directory.mkdir(parents=True, exist_ok=True)
    loop.write_json(directory / "config.json", {
      **spec.config.to_dict(), "stage": spec.stage, "runs": spec.runs
    })  # fmt: skip
    result: dict = {"rows": [], "curves": [], "routing": [], "samples": []}
    for seed, rate in spec.runs:
      stop.check()
      config = spec.config.copy_and_resolve_references()
      config.unlock()
      config.seed, config.optimizer.learning_rate = seed, rate
      name = f"seed{seed}-lr{rate:g}"
      run = language.Run(config, directory / name, self.workdir, self.display)
      found = run.train(f"{spec.label}/{name}", by_generation=spec.stage == "final")
      result["rows"].append(self._row(spec, run, found, f"{spec.identity}-{name}"))
      for line in metrics.read_metrics(run.directory):
        # What the routing gains at the end is measured once, after the last line.
        values = found["after"] if line["step"] == found["steps"] else line
        result["curves"].append(
          {
            "run_id": f"{spec.identity}-{name}",
            "step": line["step"],
            "train_loss": line["train/loss"],
            **{column: values[column] for column in routing.COLUMNS if column in values},
          }
        )
      result["samples"] += [
        {"run_id": f"{spec.identity}-{name}", **sample} for sample in found.get("samples", ())
      ]
    loop.write_json(directory / "result.json", result)
    return result

  def summary(self, rows: list[dict]) -> str:
    """One line about the final runs of a setting."""
    nats = sum(row["validation_nats"] for row in rows) / len(rows)
    if "test_accuracy" not in rows[0]:
      return f"validation {nats:.3f} nats"
    before = rows[0]["base_test_accuracy"]
    after = sum(row["test_accuracy"] for row in rows) / len(rows)
    return f"validation {nats:.3f} nats, exact match {100 * before:.1f} % -> {100 * after:.1f} %"

  def _directory(self, spec: loop.GroupSpec) -> pathlib.Path:
    return self.workdir / "groups" / spec.identity

  def _row(self, spec, run: language.Run, found: dict, run_id: str) -> dict:
    adapter, config, after = run.model.adapter, run.config, found["after"]
    row = {
      "run_id": run_id, "stage": spec.stage, "task": config.data.name,
      "method": config.label or config.adapter.name, "adapter": adapter.method,
      "seed": found["seed"],
      "learning_rate": found["learning_rate"], "rank": adapter.rank, "atoms": adapter.atoms,
      "top_k": adapter.top_k, "in_prompt": config.instruction.in_prompt,
      "shuffled": config.instruction.shuffled, "trainable_params": found["trainable_params"],
      "steps": found["steps"], "seconds": found["seconds"],
      "validation_nats": after.get("validation/nats", float("nan")),
    }  # fmt: skip
    for split in _SPLITS:
      for side, prefix in ((found["before"], "base_"), (after, "")):
        for score in ("accuracy", "nats"):
          if f"{split}/{score}" in side:
            row[f"{prefix}{split}_{score}"] = side[f"{split}/{score}"]
        row |= {
          f"{prefix}{name}": value for name, value in side.items()
          if name.startswith(f"{split}/") and name.count("/") == 2
        }  # fmt: skip
    routed = ("router/", "routing/")
    row |= {name: value for name, value in after.items() if name.startswith(routed)}
    row["directory"] = str(run.directory.relative_to(self.workdir))
    return row
