"""A list of the files in a finished folder, with which later damage is detected.

Orbax checks the index of its array files, not the numbers in them: an array whose bytes changed on
the disk restores without a warning. The list is written just before a checkpoint gets its final
name, so that a checkpoint without a list was never finished.
"""

import hashlib
import json
import pathlib
from concurrent import futures

FILE_NAME = "checksums.json"
_STEP_METADATA = "_CHECKPOINT_METADATA"  # Orbax adds the time of the commit after our list
_COMMITTED = "commit_success.txt"  # and this file
_THREADS = 8  # files hashed at the same time: hashing releases the interpreter lock


def write(folder: pathlib.Path) -> None:
  """Lists every file below `folder` with its size and SHA-256 in `checksums.json`."""
  paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  names = [path.relative_to(folder).as_posix() for path in paths]
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = list(pool.map(_digest, paths))
  entries = {
    name: {"bytes": path.stat().st_size, "sha256": digest}
    for name, path, digest in zip(names, paths, digests, strict=True)
    if name not in (_COMMITTED, FILE_NAME)
  }
  (folder / FILE_NAME).write_text(json.dumps(entries, indent=1))


def damage(folder: pathlib.Path, contents: bool = True) -> str | None:
  """What is wrong with a folder that `write` listed and Orbax committed, or None.

  Args:
    folder: of one checkpoint.
    contents: whether files are read; False compares names and sizes only.
  """
  if not folder.is_dir():
    return "it is not a folder"
  if not any(folder.iterdir()):
    return "the folder is empty"
  try:
    listed = json.loads((folder / FILE_NAME).read_text())
    expected = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in listed.items()}
  except FileNotFoundError:
    return f"{FILE_NAME} is missing: it was never finished, or an earlier version wrote it"
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return f"{FILE_NAME} cannot be read"
  for name in (*expected, _COMMITTED):
    if not (folder / name).is_file():
      return f"{name} is missing"
  for name, (size, _) in expected.items():
    actual = (folder / name).stat().st_size
    if name != _STEP_METADATA and actual != size:
      return f"{name} has {actual} bytes of {size}"
  if not contents:
    return None
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(_digest, [folder / name for name in expected])
    for (name, (_, digest)), actual in zip(expected.items(), digests, strict=True):
      if actual != digest:
        return f"{name} was changed"
  return None


def _digest(path: pathlib.Path) -> str:
  """SHA-256 of a file; '' where it cannot be read."""
  try:
    if path.name == _STEP_METADATA:
      content = json.loads(path.read_text())
      content.pop("commit_timestamp_nsecs")
      return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except (OSError, ValueError, KeyError, AttributeError):
    return ""
