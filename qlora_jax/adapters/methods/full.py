"""The two reference points without a branch: the frozen base, and full fine-tuning."""

from qlora_jax.adapters import registry

_INK = "#24292f"  # the report's text colour: reference points have no colour of a family


def _nothing(config, rank: int, inputs: int, outputs: int) -> int:
  del config, rank, inputs, outputs
  return 0


METHODS = (
  registry.Method(
    "none",
    (
      registry.Preset(
        "none", "Frozen base", _INK, ":", "x", True, "the pretrained network, unchanged"
      ),
    ),
    branch=None,
    map_parameters=_nothing,
    map_flops=_nothing,
    learning_rate=1e-3,  # nothing is trained
    decayed=(),
  ),
  registry.Method(
    "full",
    (
      registry.Preset(
        "full",
        "Full fine-tuning",
        _INK,
        "-",
        "s",
        True,
        "every weight of the base is trained",
      ),
      registry.Preset(
        "full_input",
        "Full with instruction",
        _INK,
        "--",
        (4, 1, 0),
        True,
        "full fine-tuning, with the instruction's embedding added to the network's input",
        {"instruction_in_input": True},
      ),
    ),
    branch=None,
    map_parameters=_nothing,
    map_flops=_nothing,
    learning_rate=1e-4,  # a tenth of LoRA's
    trains_base=True,
    decayed=(),  # of the base: `optimizer.DECAYED_IN_BASE`
  ),
)
