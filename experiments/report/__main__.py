"""`python -m experiments.report --workdir=DIR`: writes the report of a study."""

import argparse
import sys
from collections.abc import Sequence

from experiments.report import build
from qlora_jax import errors


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code, 2 for a mistake in what it was given."""
  parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
  parser.add_argument("--workdir", required=True, help="the study: results.parquet, study.json")
  parser.add_argument("--out", help="where the report goes; WORKDIR/report unless given")
  parser.add_argument(
    "--baseline",
    action="append",
    default=[],
    metavar="[TASK=]METHOD[,METHOD]",
    help="what a task's methods, or all tasks', are compared with (default lora); may repeat",
  )
  options = parser.parse_args(arguments)
  try:
    baselines = dict(_baseline(text) for text in options.baseline)
    print(build.write_report(options.workdir, options.out, baselines))
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _baseline(text: str) -> tuple[str, tuple[str, ...]]:
  task, _, methods = text.rpartition("=")
  names = tuple(name.strip() for name in methods.split(",") if name.strip())
  if not names:
    raise errors.UserError(f"--baseline: {text!r} names no method; use TASK=METHOD or METHOD.")
  return task.strip(), names


if __name__ == "__main__":
  sys.exit(main())
