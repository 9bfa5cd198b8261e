"""The instruction by the place where it enters, and the weights, on a language model."""

import functools

from experiments.factorial import analysis
from experiments.questions import factorial, question

LANGUAGE = analysis.DOMAINS["language"]
_TOLD = (
  ("prior − none", "the instruction as a prior lowers the likelihood's nats", None),
  ("query − none", "the instruction in the query lowers them", None),
  ("input − none", "the instruction in the prompt lowers them", None),
  (
    "on − LoRA, none",
    "routing lowers them against LoRA where nothing reads the instruction",
    "none/on/absent",
  ),
  (
    "on − LoRA, input",
    "routing lowers them against LoRA where both have the prompt",
    "input/on/true+prompt",
  ),
  (
    "on − static",
    "routing by the input lowers them against a static mixture",
    "input/on/true+prompt",
  ),
  (
    "(prior − none) × (on − static)",
    "the prior gains by routing (interaction with static)",
    "prior/on/true",
  ),
  (
    "(prior − none) × (on − uniform)",
    "the prior gains by routing (interaction with uniform)",
    "prior/on/true",
  ),
  (
    "on − example, query",
    "routing tokens beats routing examples (instruction in the query)",
    "query/on/true",
  ),
)

QUESTION = question.Question(
  name="factorial_language",
  caption="Left: likelihood of test answers in nats a token (three seeds, 95 % Student intervals)"
  " by where the instruction enters and how atoms are weighed, SmolLM2-135M-Instruct on three"
  " tasks of instruction-induction that only the instruction tells apart, 40 steps. Right: main"
  " effects and interactions at wordings that training has not seen, in per cent of the nats;"
  " black where Holm's p is below .05.",
  study="factorial_language",
  command="python launch.py --config=configs/factorial_language.py"
  " --workdir=runs/factorial-language --sweep",
  draw=functools.partial(factorial.draw, domain=LANGUAGE),
  tables={"factorial_language": functools.partial(factorial.table, LANGUAGE)},
  answer=functools.partial(factorial.answer, LANGUAGE, _TOLD),
)
