"""What does the instruction give a language model, by the place where it enters?

The factorial of `factorial.py` on SmolLM2-135M-Instruct:
`docs/studies/factorial.md#on-a-language-model`.

  python launch.py --config=configs/factorial_language.py --workdir=runs/factorial-language --sweep
  python -m experiments factorial_language --from=runs/factorial-language
"""

from experiments import study as study_lib
from experiments.analysis import factorial as analysis
from experiments.studies import factorial

_CLAIMS = (
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

STUDY = study_lib.Study(
  **factorial.of_domain(analysis.DOMAINS["language"], _CLAIMS),
  question="What does the instruction give a language model, by the place where it enters?",
  about="The factorial of instruction and weights on SmolLM2-135M-Instruct: three tasks whose"
  " inputs are single words, so that only the instruction separates them. Three seeds per"
  " cell, three learning rates; Student intervals over seeds. The runs are too short to test"
  " routing: it is inert in the setting that was measured (support 5.03 at the start, 5.01"
  " at the end; 1.0164 nats as trained, 1.0156 with equal weights).",
  caption="Left: likelihood of test answers in nats per token (three seeds, 95 % Student intervals)"
  " by where the instruction enters and how atoms are weighed, SmolLM2-135M-Instruct on three"
  " tasks of instruction-induction that only the instruction tells apart, 40 steps. Right: main"
  " effects and interactions at wordings that training has not seen, in per cent of the nats;"
  " black where Holm's p is below .05.",
  position=80,
)
