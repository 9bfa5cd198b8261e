"""One process of a fine-tuning run: its losses and, from the first process, its adapter.

  python tests/parallel/process_case.py WEIGHTS DIRECTORY

Who is who comes from the environment, as for `launch.py`; so does the number of devices.
"""

import pathlib
import sys

from configs import llm
from qlora_jax.parallel import processes
from qlora_jax.training import language, progress


def config(weights: str):
  config = llm.get_config()
  config.model.weights, config.model.layers_per_block = weights, 1
  config.adapter.update({"name": "queryable", "rank": 4, "atoms": 4})
  config.optimizer.update({"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "clip": 0.0})
  config.data.tasks, config.data.train_rows, config.data.length = ("plural", "uppercase"), 20, 64
  config.eval.update({"every": 1, "examples": 1, "max_tokens": 2, "batch_size": 2})
  return config


def main(weights: str, directory: pathlib.Path) -> None:
  processes.start()
  with processes.together():
    display = progress.Display(total_points=1, plain=True, stream=processes.terminal())
    language.Run(config(weights), directory, directory, display).train("case", by_generation=False)


if __name__ == "__main__":
  main(sys.argv[1], pathlib.Path(sys.argv[2]))
