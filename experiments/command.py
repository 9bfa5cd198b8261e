"""The command lines of the experiments: `python -m experiments.NAME`."""

import argparse
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Callable

import ml_collections

from qlora_jax import errors, sweeps


def parser(name: str, about: str) -> argparse.ArgumentParser:
  """A parser with the experiment's description as it is written."""
  return argparse.ArgumentParser(
    prog=f"python -m experiments.{name}",
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def of_sweep(name: str, about: str, results: pathlib.Path | None) -> argparse.ArgumentParser:
  """For what `launch.py --sweep` has trained: `--from` keeps its results before they are read."""
  made = parser(name, about)
  made.add_argument("--results", type=pathlib.Path, default=results, help="where they are kept")
  made.add_argument(
    "--from",
    dest="parts",
    type=pathlib.Path,
    action="append",
    help="a sweep to keep first; several times if machines have shared its settings",
  )
  return made


def of_units(name: str, about: str, results: pathlib.Path) -> argparse.ArgumentParser:
  """For an experiment that trains by itself, unit by unit (`units.py`)."""
  made = parser(name, about)
  made.add_argument("--workdir", type=pathlib.Path, help="trains what is missing there first")
  made.add_argument("--config", default=f"configs/{name}.py", help="config file, with :variant")
  made.add_argument("--limit", type=int, help="make at most so many units of work now")
  made.add_argument("--results", type=pathlib.Path, default=results, help="where tables go")
  return made


def load(text: str) -> tuple[ml_collections.ConfigDict, list[dict]]:
  """A config file's config and the points of its `get_hyper`.

  Raises:
    errors.UserError: no such file, or no such variant.
  """
  path, _, variant = text.partition(":")
  if not pathlib.Path(path).is_file():
    raise errors.UserError(f"--config: {path} is no file")
  spec = importlib.util.spec_from_file_location("config_of_experiment", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant).lock(), module.get_hyper(sweeps, variant)


def given() -> str:
  """The command that was given, as `study.json` keeps it."""
  name = pathlib.Path(sys.argv[0]).parent.name
  return "python -m experiments." + shlex.join([name, *sys.argv[1:]])


def run(main: Callable[[], None]) -> None:
  """Calls a command's `main`: a user's mistake is one line and exit code 2."""
  try:
    main()
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
