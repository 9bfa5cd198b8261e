"""The package's commands as a user gives them, run in this process: without the imports again."""

import contextlib
import importlib
import importlib.util
import io
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from unittest import mock

from absl import flags
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parents[1]


def run(arguments: Sequence[str], told: str = "") -> subprocess.CompletedProcess:
  """What `python *arguments` gives: exit code and everything that is printed.

  Args:
    arguments: `launch.py ...` or `-m MODULE ...`; with absl's flags, or with a `main` of its own.
    told: standard input.
  """
  if arguments[0] == "-m":
    name, rest = arguments[1], list(arguments[2:])
  else:
    name, rest = arguments[0].removesuffix(".py"), list(arguments[1:])
  out, error = io.StringIO(), io.StringIO()
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  with (
    contextlib.chdir(ROOT),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(error),
    mock.patch.object(sys, "argv", [arguments[0], *rest]),
    mock.patch.object(sys, "stdin", io.StringIO(told)),
  ):
    try:
      code = _call(name, rest)
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
  return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def _call(name: str, rest: list[str]) -> int:
  package = importlib.util.find_spec(name).submodule_search_locations is not None
  module = importlib.import_module(f"{name}.__main__" if package else name)
  if not hasattr(module, "cli"):
    return module.main(rest) or 0
  values = getattr(module, "_FLAGS", flags.FLAGS)
  saved = flagsaver.save_flag_values(values)
  try:
    module.cli()
  except SystemExit as end:
    return end.code or 0
  finally:
    now = flagsaver.save_flag_values(values)
    # Of the flags that are new, those of modules that were imported late stay: only the config's
    # own are of this one command.
    late = {key: flag for key, flag in now.items() if not key.startswith("config.")}
    flagsaver.restore_flag_values(late | saved, values)
  return 0
