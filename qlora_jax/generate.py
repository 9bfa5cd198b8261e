"""Prompts a fine-tuned model in the terminal.

  python -m qlora_jax.generate --adapter=DIR --instruction="Write the plural." --prompt=otter
  python -m qlora_jax.generate --adapter=DIR

Without --prompt, every line of standard input is a prompt. Lines that begin with a slash are
commands: /instruction TEXT, /adapter on, /adapter off, /quit.
"""

import sys

from absl import flags

from qlora_jax import errors, finetuned
from qlora_jax.models import generation

_FLAGS = flags.FlagValues()
_ADAPTER = flags.DEFINE_string("adapter", None, "Adapter folder.", flag_values=_FLAGS)
_WEIGHTS = flags.DEFINE_string(
  "weights", None, "Base model, if moved: name, folder, hub id or .gguf.", flag_values=_FLAGS
)
_PROMPT = flags.DEFINE_string("prompt", None, "One prompt; default: dialogue.", flag_values=_FLAGS)
_INSTRUCTION = flags.DEFINE_string("instruction", "", "Instruction.", flag_values=_FLAGS)
_ON = flags.DEFINE_bool("adapter_on", True, "Whether to use the adapter.", flag_values=_FLAGS)
_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Maximum of new tokens.", flag_values=_FLAGS)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 for greedy decoding.", flag_values=_FLAGS)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Top-p of nucleus sampling.", flag_values=_FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.", flag_values=_FLAGS)


def main() -> None:
  """Loads the adapter; answers one prompt, or the prompts of a dialogue."""
  if not _ADAPTER.value:
    raise errors.UserError("--adapter: missing; give the adapter folder of a finished run")
  sampling = generation.SamplingConfig(_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value)
  model = finetuned.FineTuned(_ADAPTER.value, _WEIGHTS.value)
  instruction, adapter_on = _INSTRUCTION.value, _ON.value
  if _PROMPT.value is not None:
    _answer(model, _PROMPT.value, instruction, sampling, adapter_on)
    return
  interactive = sys.stdin.isatty()
  if interactive:
    print(__doc__.rpartition("\n\n")[2].strip())
  while True:
    if interactive:
      print("> ", end="", flush=True)
    line = sys.stdin.readline()
    command, _, argument = line.strip().partition(" ")
    if not line or command == "/quit":
      return
    if command == "/instruction":
      instruction = argument
    elif command == "/adapter" and argument in ("on", "off"):
      adapter_on = argument == "on"
    elif command.startswith("/"):
      print("commands: /instruction TEXT, /adapter on, /adapter off, /quit")
    elif line.strip():
      try:
        _answer(model, line.strip(), instruction, sampling, adapter_on)
      except errors.UserError as error:  # an error does not end the dialogue
        print(f"error: {error}")


def _answer(model, prompt, instruction, sampling, adapter_on) -> None:
  for piece in model.stream(prompt, instruction, sampling, adapter_on):
    print(piece, end="", flush=True)
  print()


def cli() -> None:
  """Parses flags and runs `main`; a user error prints one line and exits with code 2."""
  try:
    positional = _FLAGS(sys.argv)
    if len(positional) > 1:
      raise errors.UserError(f"{positional[1]}: not a flag; see --help")
    main()
  except (errors.UserError, flags.Error) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print()
    sys.exit(130)


if __name__ == "__main__":
  cli()
