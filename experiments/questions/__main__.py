"""Remakes the figures of docs/figures from committed results.

python -m experiments.questions              # all of them
python -m experiments.questions stability    # one
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from experiments.questions import every
from experiments.questions import question as question_lib
from qlora_jax import errors

HEAD = "# Figures\n\nMade by `make figures` from committed results; each is there as SVG and PNG.\n"


def index(folder: pathlib.Path) -> None:
  """Writes the captions beside the figures, those that are there in the order of the questions."""
  parts = [HEAD]
  for name, caption in every.captions().items():
    if (folder / f"{name}.png").is_file():
      parts.append(f"\n## {name.replace('_', ' ')}\n\n![{name}]({name}.png)\n\n{caption}\n")
  (folder / "README.md").write_text("".join(parts), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code, 2 for a name that is unknown."""
  parser = argparse.ArgumentParser(prog="python -m experiments.questions", description=__doc__)
  parser.add_argument("name", nargs="*", help="figures to remake; all unless named")
  names = parser.parse_args(arguments).name
  try:
    for path in every.write(names):
      print(path)
    index(question_lib.folder())
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
