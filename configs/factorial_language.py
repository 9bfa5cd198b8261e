"""The factorial of instruction and routing on a language model; that on regression: factorial.py.

SmolLM2-135M-Instruct on three tasks of instruction-induction whose inputs are single words, so that
only the instruction separates antonym, plural and first letter. Every cell is an adapter of
2,450,000 parameters (2 %) on all seven maps.

  python launch.py --config=configs/factorial_language.py:runlocal --workdir=runs/local --sweep
  python launch.py --config=configs/factorial_language.py --workdir=runs/factorial-language --sweep

A reduced grid, for two cores: three learning rates on one search seed, chosen by the likelihood of
validation answers, then three fresh seeds; 40 steps. `python -m experiments factorial_language`
makes tables and figure.
"""

import ml_collections

from configs import factorial, llm
from qlora_jax import sweeps

VARIANTS = ("", "runlocal")
LEARNING_RATES = llm.LEARNING_RATES
TASKS = ("antonyms", "singular_to_plural", "first_word_letter")

# Where the instruction enters; its words in the prompt stand where regression has its embedding in
# the network's input.
INSTRUCTION = factorial.INSTRUCTION | {"input": {"instruction.in_prompt": True}}
ROUTING = factorial.ROUTING | {
  # All tokens of an example are routed alike: only the instruction and a bias enter the query.
  "example": {
    "adapter.name": "queryable",
    "adapter.query_state": False,
    "adapter.summary": "none",
  },
  "lora": {"adapter.name": "lora"},
}

# (instruction, routing, truth), in the order in which they are trained. A static mixture has no
# query; routing by example without an instruction in the query is a static mixture.
CELLS = (
  ("none", "on", "absent"),
  ("prior", "on", "true"),
  ("none", "static", "absent"),
  ("prior", "static", "true"),
  ("none", "uniform", "absent"),
  ("prior", "uniform", "true"),
  ("none", "lora", "absent"),
  ("input", "lora", "true"),
  ("input", "on", "true"),
  ("query", "on", "true"),
  ("query", "example", "true"),
  ("prior", "on", "shuffled"),
  ("prior+query", "on", "true"),
  ("prior+query", "example", "true"),
  ("input", "static", "true"),
  ("input", "uniform", "true"),
  ("query", "uniform", "true"),
  ("prior", "static", "shuffled"),
  ("query", "on", "shuffled"),
  ("kl", "on", "true"),
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base setting of the factorial; `runlocal` is small enough to look at."""
  arg = arg or ""
  sweeps.check_variant(arg, VARIANTS)
  config = llm.get_config("induction")
  config.variant = arg
  config.data.tasks = TASKS
  config.optimizer.update(steps=40, batch_size=2)
  config.eval.update(every=5, validation=40, examples=25, max_tokens=8, batch_size=25)
  if arg:
    config.optimizer.steps = 5
    config.eval.update(validation=5, examples=2, batch_size=6)
    config.protocol.final_seeds = (100, 101)
  return config


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """All cells times the learning rates; `runlocal` has the first four at one rate."""
  points = [
    {
      "label": f"{instruction}/{routing}/{truth}",
      "instruction.exchanged": truth == "shuffled",
      **ROUTING[routing],
      **INSTRUCTION[instruction],
    }
    for instruction, routing, truth in CELLS[: 4 if arg else None]
  ]
  rates = LEARNING_RATES[1:2] if arg else LEARNING_RATES
  return hyper.product(points, hyper.sweep("optimizer.learning_rate", rates))
