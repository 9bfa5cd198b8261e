"""Effects of the instruction and of the weights, on targets that only the instruction separates.

The task is `multi_target`: six targets over the same inputs. Every cell is an adapter of 8,192
parameters (2 %) at rank 6; the atoms fill the budget, so that cells differ in their number alone.

  python launch.py --config=configs/factorial.py:runlocal --workdir=runs/local-factorial --sweep
  python launch.py --config=configs/factorial.py --workdir=runs/factorial --sweep

544 runs, 650 s of CPU time. `python -m experiments factorial` makes tables and figure; the cells
that do not exist, and why, are in docs/studies/factorial.md.
"""

import ml_collections

from configs import regression

RANK = 6

# Where the instruction enters. A penalty reaches training alone: no prediction reads it.
INSTRUCTION = {
  "none": {},
  "prior": {"adapter.prior_weight": 1.0},
  "query": {"adapter.instruction_in_query": True},
  "prior+query": {"adapter.prior_weight": 1.0, "adapter.instruction_in_query": True},
  "input": {"adapter.instruction_in_input": True},
  "kl": {"adapter.kl_weight": 0.01},
}
ROUTING = {
  "on": {"adapter.name": "queryable"},
  "static": {"adapter.name": "static"},
  "uniform": {"adapter.name": "uniform"},
}
NO_QUERY = ("query", "prior+query")  # a static mixture has no query that could read it


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The base setting of the factorial; `runlocal` is small enough to look at."""
  config = regression.of_study(arg)
  config.data.task = "multi_target"
  return config


def cells() -> list[tuple[str, str, str]]:
  """(instruction, routing, truth) of every cell that is trained; its label joins them by '/'."""
  return [
    (instruction, routing, truth)
    for instruction in INSTRUCTION
    for routing in ROUTING
    for truth in (("true", "shuffled") if instruction != "none" else ("absent",))
    if not (routing == "static" and instruction in NO_QUERY)
  ]


def get_hyper(hyper, arg: str | None = None) -> list[dict]:
  """All cells, and LoRA alone and with the instruction in its input; times the rates."""
  points = []
  for instruction, routing, truth in cells():
    points.append(
      {
        "label": f"{instruction}/{routing}/{truth}",
        "adapter.rank": RANK,
        "adapter.atoms": 0,
        "instruction.shuffled": truth == "shuffled",
        **INSTRUCTION[instruction],
        **ROUTING[routing],
      }
    )
  for name, truth in (("lora", "absent"), ("lora_input", "true"), ("lora_input", "shuffled")):
    instruction = "input" if name == "lora_input" else "none"
    points.append(
      {
        "label": f"{instruction}/lora/{truth}",
        "adapter.name": name,
        "instruction.shuffled": truth == "shuffled",
      }
    )
  points.sort(key=lambda point: point["instruction.shuffled"])  # the control comes last
  rates = (3e-3, 1e-2) if arg else regression.LEARNING_RATES
  return hyper.product(points, hyper.sweep("optimizer.learning_rate", rates))
