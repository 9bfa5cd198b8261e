"""Talks to a fine-tuned model in the terminal.

  python -m qlora_jax.generate --adapter=DIR --instruction="Write the plural." --prompt=otter
  python -m qlora_jax.generate --adapter=DIR

Without --prompt every line of standard input is a prompt. Lines that begin with a slash are
commands: /instruction TEXT, /adapter on, /adapter off, /quit.
"""

import sys

from absl import flags

from qlora_jax import errors, finetuned
from qlora_jax.models import generation

_FLAGS = flags.FlagValues()
_ADAPTER = flags.DEFINE_string("adapter", None, "Adapter folder.", flag_values=_FLAGS)
_WEIGHTS = flags.DEFINE_string(
  "weights", None, "The base, if it has moved: name, folder, hub id, .gguf.", flag_values=_FLAGS
)
_PROMPT = flags.DEFINE_string("prompt", None, "One prompt; else a dialogue.", flag_values=_FLAGS)
_INSTRUCTION = flags.DEFINE_string("instruction", "", "What to do.", flag_values=_FLAGS)
_ON = flags.DEFINE_bool("adapter_on", True, "Whether the adapter is used.", flag_values=_FLAGS)
_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Most new tokens.", flag_values=_FLAGS)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", flag_values=_FLAGS)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus of the sampling.", flag_values=_FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.", flag_values=_FLAGS)


def main() -> None:
  """Loads the adapter, then answers one prompt or a dialogue."""
  if not _ADAPTER.value:
    raise errors.UserError("--adapter: missing; give the adapter folder of a finished run")
  sampling = generation.SamplingConfig(_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value)
  model = finetuned.FineTuned(_ADAPTER.value, _WEIGHTS.value)
  instruction, adapter_on = _INSTRUCTION.value, _ON.value
  if _PROMPT.value is not None:
    _answer(model, _PROMPT.value, instruction, sampling, adapter_on)
    return
  shown = sys.stdin.isatty()
  if shown:
    print(__doc__.rpartition("\n\n")[2].strip())
  while True:
    if shown:
      print("> ", end="", flush=True)
    line = sys.stdin.readline()
    command, _, rest = line.strip().partition(" ")
    if not line or command == "/quit":
      return
    if command == "/instruction":
      instruction = rest
    elif command == "/adapter" and rest in ("on", "off"):
      adapter_on = rest == "on"
    elif command.startswith("/"):
      print("commands: /instruction TEXT, /adapter on, /adapter off, /quit")
    elif line.strip():
      try:
        _answer(model, line.strip(), instruction, sampling, adapter_on)
      except errors.UserError as error:  # the dialogue goes on
        print(f"error: {error}")


def _answer(model, prompt, instruction, sampling, adapter_on) -> None:
  for piece in model.stream(prompt, instruction, sampling, adapter_on):
    print(piece, end="", flush=True)
  print()


def cli() -> None:
  """Parses flags and runs `main`, turning mistakes into one line and exit code 2."""
  try:
    rest = _FLAGS(sys.argv)
    if len(rest) > 1:
      raise errors.UserError(f"{rest[1]}: not a flag; see --help")
    main()
  except (errors.UserError, flags.Error) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print()
    sys.exit(130)


if __name__ == "__main__":
  cli()
