"""One process of a fine-tuning without generation; process 0 writes losses and the adapter.

  python tests/parallel/process_case.py WEIGHTS DATA DIRECTORY

The environment sets the index of the process, as for `launch.py`, and the number of devices.
"""

import pathlib
import sys

from configs import llm
from qlora_jax.parallel import processes
from qlora_jax.training import loop, progress
from qlora_jax.workloads import language, workload


def fields(weights: str, data: str) -> dict:
  """The fields that differ from the config's defaults, by path."""
  return {
    "model.weights": weights,
    "model.layers_per_block": 1,
    "adapter.name": "queryable",
    "adapter.rank": 4,
    "adapter.atoms": 4,
    "optimizer.steps": 3,
    "optimizer.batch_size": 4,
    "optimizer.learning_rate": 1e-2,
    "data.name": data,
    "data.length": 64,
    "eval.every": 1,
    "eval.examples": 2,
    "eval.max_tokens": 3,
    "eval.batch_size": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
  }


def main(weights: str, data: str, directory: pathlib.Path) -> None:
  config = llm.get_config()
  config.update_from_flattened_dict(fields(weights, data))
  processes.start()
  with processes.together():
    display = progress.Display(total_trials=1, plain=True, stream=processes.terminal())
    trial = workload.Trial(config.seed, config.optimizer.learning_rate)
    cohort = workload.Cohort(config, "search", (trial,))
    resources = language.Resources(directory, display)
    training = resources.open(cohort, directory)
    loop.train(training, resources.saving(cohort, directory), display)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
