"""The small studies that `compare_checkouts.py` runs in a checkout, and the names they use.

`NAMES` is the only place that knows how files, fields, columns and values are called. Names on the
left are those that stored results have; where a checkout has the name on the right instead, that
one is used, so that the same set runs before, during and after a renaming.
"""

import dataclasses
import hashlib
from typing import Any

# Old name -> new name; a name that is not listed is the same in both.
NAMES: dict[str, dict[str, str]] = {
  "module": {  # of configs and commands: "configs.llm"
    "experiments.depth": "experiments.studies.depth",
    "experiments.stream": "experiments.studies.stream",
  },
  "field": {},  # of configs, dotted: "optimizer.steps", "adapter.name"
  "file": {},  # in a work directory: "results.parquet"; a pattern such as "units/*.json"
  # Of the tables of results.
  "column": {"run_id": "trial_id", "method": "arm", "adapter": "family"},
  "value": {},  # in columns: "queryable_prior"
}
_PRESETS = (
  "none full full_input lora lora_input rslora dora lora_xs comol lily queryable "
  "queryable_topk queryable_recurrent queryable_no_summary queryable_query queryable_prior "
  "queryable_kl queryable_prior_query static uniform"
)
PRESETS = tuple(_PRESETS.split())
_METHODS = "none full lora rslora dora lora_xs comol lily queryable_prior_query"
RATE, NAME = "optimizer.learning_rate", "adapter.name"


@dataclasses.dataclass(frozen=True)
class Study:
  """One command in a checkout.

  Attributes:
    name: in messages, and of the files of stored results.
    config: module and variant of the config file.
    fields: overrides of the config.
    points: of a sweep; none for a single run.
    command: module that is run with `python -m`; launch.py where it is empty.
    interrupted: whether the run gets SIGTERM once it has two checkpoints, and is started again.
    arguments: more of the command line.
  """

  name: str
  config: str
  fields: dict[str, Any]
  points: tuple[dict[str, Any], ...] = ()
  command: str = ""
  interrupted: bool = False
  arguments: tuple[str, ...] = ()


def studies() -> tuple[Study, ...]:
  """The set, in the order in which it is run."""
  small = {
    "optimizer.steps": 20,
    "eval.every": 10,
    "pretrain.steps": 30,
    "instruction.dim": 8,
    "instruction.encoder": "wordllama",
    # Search and final runs are one compiled program.
    "protocol.search_seeds": (0,),
    "protocol.final_seeds": (100,),
    "protocol.least_runs": 2,
  }
  real = {"data.task": "bikeshare", "data.noise_level": 0.0, NAME: "queryable_prior_query"}
  often = {NAME: "lora", "optimizer.steps": 200, "eval.every": 5, "checkpoint.seconds": 0.0}
  rates = (3e-3, 1e-2)
  language = {
    "model.weights": "MODEL",
    "model.layers_per_block": 1,
    "adapter.rank": 4,
    "optimizer.steps": 4,
    "optimizer.batch_size": 4,
    RATE: 3e-2,
    "data.tasks": ("plural", "uppercase"),
    "data.train_rows": 20,
    "data.length": 256,
    "instruction.dim": 4,
    "instruction.encoder": "wordllama",
    "eval.every": 2,
    "eval.validation": 4,
    "eval.examples": 2,
    "eval.max_tokens": 6,
    "eval.batch_size": 4,
    "protocol.final_seeds": (100,),
  }
  units = {
    "pretrain.steps": 30,
    "optimizer.steps": 20,
    "instruction.encoder": "wordllama",
    "protocol.search_seeds": (0,),
    "protocol.final_seeds": (100, 101),
  }
  steps = {
    **language,
    NAME: "queryable_prior",
    "adapter.atoms": 4,
    "optimizer.steps": 24,
    "checkpoint.seconds": 0.0,
    "checkpoint.validate_every": 4,
    "instruction.shuffled": True,
  }
  seed = ("--config.seed=3",)
  return (
    Study(
      "presets on multi_target",
      "configs.regression",
      {**small, "data.task": "multi_target"},
      tuple({NAME: name, RATE: rate} for name in PRESETS for rate in rates),
    ),
    Study(
      "regimes, loss every step",
      "configs.regression:stability",
      {**small, "eval.every": 1},
      tuple({NAME: name, RATE: rate} for name in ("lora", "queryable") for rate in rates),
    ),
    Study(
      "bikeshare, MiniLM",
      "configs.regression:runlocal",
      {**small, **real, "instruction.encoder": "minilm"},
      arguments=seed,
    ),
    Study("regression, uninterrupted", "configs.regression", {**small, **often}, arguments=seed),
    Study(
      "regression, interrupted",
      "configs.regression",
      {**small, **often},
      arguments=seed,
      interrupted=True,
    ),
    Study("language arms", "configs.llm", language, _arms()),
    Study("language, uninterrupted", "configs.llm", steps, arguments=seed),
    Study("language, interrupted", "configs.llm", steps, arguments=seed, interrupted=True),
    Study(
      "depth",
      "configs.depth:runlocal",
      {**units, "transfer.steps": 20},
      (
        {"data.task": "regimes", NAME: "queryable", RATE: 1e-2},
        {"data.task": "regimes", NAME: "queryable", RATE: 3e-3},
      ),
      "experiments.depth",
      arguments=("--limit=4",),
    ),
    Study(
      "stream",
      "configs.stream:runlocal",
      {**units, "stream.steps": 10},
      tuple({"data.task": "regimes", RATE: rate} for rate in rates),
      "experiments.stream",
      arguments=("--limit=2",),
    ),
  )


# Of these pairs the second must give what the first gives.
SAME = {
  "regression, interrupted": "regression, uninterrupted",
  "language, interrupted": "language, uninterrupted",
}


def _arms() -> tuple[dict[str, Any], ...]:
  """Language arms: every method, and the ways in which the instruction and the batch are used."""
  arms = [
    {NAME: name, "adapter.atoms": 4 if "query" in name else None} for name in _METHODS.split()
  ]
  prompt = {
    "label": "prompt",
    NAME: "queryable_topk",
    "adapter.atoms": 4,
    "instruction.in_prompt": True,
    "optimizer.micro_batches": 2,
    "model.dtype": "bfloat16",
    "data.pack": False,
  }
  return (*arms, prompt)


def digest_of_set() -> str:
  """A hash of the set, so that results of another set are not compared."""
  text = repr(studies())
  return hashlib.sha256(text.encode()).hexdigest()[:12]
