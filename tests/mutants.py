"""Plants one-line faults and runs the tests that ought to notice them.

  python -m tests.mutants                   every fault of `planted_faults.py`
  python -m tests.mutants --only=Lily       those whose name holds a text
  python -m tests.mutants --list            their names

A fault *dies* where a test fails that passes without it, and *survives* where all pass. Each is
planted in a copy of the checkout, in a forked process that has the slow packages loaded already.
What is done is kept in `--out`, so that an interrupted campaign goes on; a fault is run again where
its file or its tests have changed since. The exit code is 1 where a fault survives.
"""

import argparse
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from tests import planted_faults

ROOT = pathlib.Path(__file__).parents[1]
DIED, SURVIVED = "died", "survived"
_SLOW = ("jax", "flax.linen", "optax", "orbax.checkpoint", "pandas", "hypothesis", "pytest")
_FAILED = 1  # pytest's exit code where a test failed


def problems(faults: Sequence[planted_faults.Fault], root: pathlib.Path = ROOT) -> list[str]:
  """What is wrong with the list: a text that is not there once, a change of nothing, no test."""
  found = []
  for fault in faults:
    count = (root / fault.path).read_text().count(fault.old)
    if count != 1:
      found.append(f"{fault.name}: its text is {count} times in {fault.path}")
    if fault.old == fault.new:
      found.append(f"{fault.name}: changes nothing")
    for test in fault.tests:
      path, _, name = test.partition("::")
      if not (root / path).exists() or (name and f"def {name}(" not in (root / path).read_text()):
        found.append(f"{fault.name}: there is no {test}")
  names = [fault.name for fault in faults]
  return found + [f"{name}: twice" for name in set(names) if names.count(name) > 1]


def run(faults: Sequence[planted_faults.Fault], out: pathlib.Path) -> dict[str, dict]:
  """Runs the faults that `out` has no result of; returns the results of all, by name."""
  earlier = json.loads(out.read_text()) if out.exists() else {}
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    copy = _copy(pathlib.Path(folder, "checkout"))
    for module in _SLOW:
      importlib.import_module(module)
    for number, fault in enumerate(faults, start=1):
      digest = _digest(fault)
      if earlier.get(fault.name, {}).get("digest") == digest:
        results[fault.name] = earlier[fault.name]
      else:
        began = time.monotonic()
        outcome, test = _plant(copy, fault)
        seconds = round(time.monotonic() - began, 1)
        results[fault.name] = {
          "outcome": outcome,
          "by": test,
          "seconds": seconds,
          "digest": digest,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**earlier, **results}, indent=1))
      result = results[fault.name]
      print(
        f"{number}/{len(faults)} {result['outcome']}: {fault.name}"
        + (f" (by {result['by']})" if result["by"] else ""),
        flush=True,
      )
    _check_sound(copy, results)
  return results


def _plant(copy: pathlib.Path, fault: planted_faults.Fault) -> tuple[str, str]:
  """How a fault fares, and the first test that noticed it."""
  path = copy / fault.path
  sound = path.read_text()
  path.write_text(sound.replace(fault.old, fault.new))
  try:
    for test in fault.tests:
      code, said = _pytest(copy, test)
      if code == _FAILED:
        lines = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return DIED, lines[0].partition(" ")[2].partition(" - ")[0] if lines else test
      if code:
        raise SystemExit(f"{fault.name}: pytest ended with {code} on {test}:\n{said[-2000:]}")
  finally:
    path.write_text(sound)
  return SURVIVED, ""


def _pytest(copy: pathlib.Path, *tests: str) -> tuple[int, str]:
  """pytest's exit code and output, run in a fork that sees the copy alone."""
  log = copy.parent / "log"
  pid = os.fork()
  if pid == 0:
    with log.open("w") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["QLORA_JAX_TYPECHECK"] = "1"
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "qlora_jax")]:
      del sys.modules[name]
    sys.dont_write_bytecode = True
    import pytest

    code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-rfE", *tests])
    sys.stdout.flush()
    os._exit(int(code))
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  return code, log.read_text(errors="replace")


def _check_sound(copy: pathlib.Path, results: dict[str, dict]) -> None:
  """Runs the tests that noticed a fault without any: one that fails anyway has noticed nothing."""
  tests = sorted({result["by"] for result in results.values() if result["by"]})
  if tests and (found := _pytest(copy, *tests))[0]:
    raise SystemExit(f"these tests fail without a fault, too:\n{found[1][-2000:]}")
  print(f"without a fault the {len(tests)} tests pass", flush=True)


def _copy(target: pathlib.Path) -> pathlib.Path:
  """A copy of the checkout's files; all but Python's are links."""
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  for name in listed.stdout.splitlines():
    if not (ROOT / name).is_file():
      continue
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".py"):
      shutil.copy(ROOT / name, target / name)
    else:
      (target / name).symlink_to(ROOT / name)
  return target


def _digest(fault: planted_faults.Fault) -> str:
  """A hash of the fault, its file and its tests."""
  files = [fault.path, *(test.partition("::")[0] for test in fault.tests)]
  parts = [repr(fault), *((ROOT / name).read_text() for name in files)]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def table(results: dict[str, dict]) -> Iterator[str]:
  """Lines of Markdown: how many died, and each fault with the test that noticed it."""
  died = sum(result["outcome"] == DIED for result in results.values())
  yield f"{died} of {len(results)} planted faults die."
  yield ""
  yield "| fault | noticed by |"
  yield "| --- | --- |"
  for name, result in results.items():
    yield f"| {name} | {'`' + result['by'] + '`' if result['by'] else '**survives**'} |"


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="faults whose name holds this text")
  parser.add_argument("--list", action="store_true", help="print the names and end")
  parser.add_argument(
    "--out", type=pathlib.Path, default=ROOT / "runs/mutants.json", help="where results are kept"
  )
  parser.add_argument("--markdown", type=pathlib.Path, help="a file for the table of results")
  options = parser.parse_args(arguments)
  faults = [fault for fault in planted_faults.FAULTS if options.only in fault.name]
  if not faults:
    parser.error(f"--only: no fault's name holds {options.only!r}; see --list")
  if wrong := problems(faults):
    parser.error("; ".join(wrong))
  if options.list:
    print("\n".join(fault.name for fault in faults))
    return 0
  results = run(faults, options.out)
  survivors = [name for name, result in results.items() if result["outcome"] == SURVIVED]
  if options.markdown:
    options.markdown.write_text("\n".join(table(results)) + "\n")
  print(f"{len(results) - len(survivors)} of {len(results)} died", *survivors, sep="\n  survived: ")
  return 1 if survivors else 0


if __name__ == "__main__":
  sys.exit(main())
