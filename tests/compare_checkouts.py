"""Do two checkouts give the same numbers, bit for bit? For changes that must change no result.

  python tests/compare_checkouts.py OLD NEW                # runs both and compares
  python tests/compare_checkouts.py OLD --keep=DIR         # stores what OLD gives
  python tests/compare_checkouts.py NEW --against=DIR      # compares with what was stored

OLD and NEW are clones or worktrees of the repository. The set of small studies, the names of
columns and files, and a table of what has been renamed are in `compare_studies.py`. Each study is a
process of its own with the interpreter that runs this script (`--python` for another), on one core.
One line per study: equal, or the first difference. Exit code 1 on a difference or a failed study.
Stored results are for the machine and the packages that made them.
"""

import argparse
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import compare_runs
import compare_studies
import numpy as np


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("checkouts", type=pathlib.Path, nargs="+", metavar="CHECKOUT")
  parser.add_argument("--keep", type=pathlib.Path, help="folder to store results in")
  parser.add_argument("--against", type=pathlib.Path, help="folder of stored results")
  parser.add_argument("--python", default=sys.executable, help="interpreter of both checkouts")
  parser.add_argument("--only", default="", help="studies whose name contains this text")
  parser.add_argument("--scratch", type=pathlib.Path, help="keep all work directories here")
  options = parser.parse_args()
  given = len(options.checkouts) + (options.against is not None) + (options.keep is not None)
  if given != 2 or len(options.checkouts) > 2:
    parser.error("give two checkouts, or one with --keep or --against")
  chosen = [one for one in compare_studies.studies() if options.only in one.name]
  with tempfile.TemporaryDirectory(prefix="compare_checkouts_") as temporary:
    scratch = (options.scratch or pathlib.Path(temporary)).resolve()
    return _compare(options, chosen, scratch)


def _compare(options, chosen, scratch: pathlib.Path) -> int:
  compare_runs.write_model(scratch / "model")
  store = options.keep or options.against
  compiled = (store.resolve() if store else scratch) / "compiled"
  checkouts = [
    compare_runs.Checkout(
      root.resolve(), options.python, scratch / str(index), scratch / "model", compiled
    )
    for index, root in enumerate(options.checkouts)
  ]
  if options.keep:
    options.keep.mkdir(parents=True, exist_ok=True)
    _write_json(options.keep / "checkout.json", _description(options.checkouts[0]))
  if options.against:
    _check_description(options.against, options.checkouts[0])
  failed, given = 0, {}
  for study in chosen:
    began = time.monotonic()
    try:
      results = [checkout.run(study) for checkout in checkouts]
      if options.against:
        results.insert(0, _load(options.against, study.name))
    except (RuntimeError, ValueError) as error:
      failed += 1
      print(f"{study.name}: FAILED\n{error}", flush=True)
      continue
    given[study.name] = results[-1]
    if options.keep:
      _save(options.keep, study.name, results[0])
      verdict = f"stored, {_size(results[0])}"
    else:
      problem, notes = difference(*results)
      failed += problem is not None
      verdict = f"DIFFERENT: {problem}" if problem else f"equal, {_size(results[0])}"
      verdict += "".join(f"\n  {note}" for note in notes)
    print(f"{study.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
  for second, first in compare_studies.SAME.items():
    if first in given and second in given:
      problem, _ = difference(given[first], given[second])
      failed += problem is not None
      verdict = f"DIFFERENT: {problem}" if problem else "equal"
      print(f"{second} and {first}: {verdict}", flush=True)
  outcome = "all stored" if options.keep else "all equal"
  print(f"{failed} different or failed" if failed else outcome)
  return int(failed > 0)


def difference(old: dict, new: dict) -> tuple[str | None, list[str]]:
  """The first difference of two studies' results, None without one; and notes on new columns."""
  added = set()
  for table, rows in old["rows"].items():
    others = new["rows"].get(table, {})
    for name, row in rows.items():
      if name not in others:
        return f"{table}: no row {name}", []
      added |= {f"{table}: new column {column}" for column in others[name].keys() - row.keys()}
      for column, value in row.items():
        other = others[name].get(column, "(no such column)")
        if not _same(value, other):
          return f"{table}: row {name}, column {column}: {value!r} and {other!r}", []
    if extra := others.keys() - rows.keys():
      return f"{table}: a row too many: {min(extra)}", []
  added |= {f"new table {table}" for table in new["rows"].keys() - old["rows"].keys()}
  for name, value in old["arrays"].items():
    other = new["arrays"].get(name)
    if other is None:
      return f"no array {name}", []
    if value.shape != other.shape or value.dtype != other.dtype:
      return f"array {name}: {value.dtype}{value.shape} and {other.dtype}{other.shape}", []
    unequal = np.argwhere(~((value == other) | ((value != value) & (other != other))))
    if len(unequal):
      place = tuple(unequal[0].tolist())
      return f"array {name}, entry {place}: {value[place]!r} and {other[place]!r}", []
  if extra := new["arrays"].keys() - old["arrays"].keys():
    return f"an array too many: {min(extra)}", []
  return None, sorted(added)


def _same(value, other) -> bool:
  if _missing(value) or _missing(other):
    return _missing(value) and _missing(other)
  return value == other


def _missing(value) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))


def _size(results: dict) -> str:
  values = sum(len(row) for rows in results["rows"].values() for row in rows.values())
  rows = sum(len(rows) for rows in results["rows"].values())
  return f"{values} values in {rows} rows, {len(results['arrays'])} arrays"


def _description(root: pathlib.Path) -> dict[str, str]:
  def git(*arguments):
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  processor = next((line.partition(": ")[2] for line in info if line.startswith("model name")), "")
  return {
    "commit": git("rev-parse", "HEAD") + ("-changed" if git("status", "--porcelain") else ""),
    "set": compare_studies.digest_of_set(),
    "processor": processor,
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _check_description(store: pathlib.Path, root: pathlib.Path) -> None:
  stored, here = json.loads((store / "checkout.json").read_text()), _description(root)
  print(f"stored results are of commit {stored['commit']}; this checkout is {here['commit']}")
  for name in stored.keys() - {"commit"}:
    if stored[name] != here[name]:
      print(f"warning: {name} was {stored[name]}, is {here[name]}: numbers may differ for that")


def _save(store: pathlib.Path, name: str, results: dict) -> None:
  _write_json(store / f"{name}.json", results["rows"])
  np.savez(store / f"{name}.npz", **results["arrays"])


def _load(store: pathlib.Path, name: str) -> dict:
  path = store / f"{name}.json"
  if not path.exists():
    raise RuntimeError(f"{path}: no such stored study")
  with np.load(store / f"{name}.npz") as arrays:
    return {"rows": json.loads(path.read_text()), "arrays": dict(arrays)}


def _write_json(path: pathlib.Path, value) -> None:
  path.write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
  sys.exit(main())
