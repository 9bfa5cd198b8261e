"""Files that are whole or not there: atomic writes and locks. The one place that renames.

A file is written beside its place under a temporary name and moved in: a reader sees the old or the
new content, never a part of it, and a killed writer leaves the old one.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a temporary path beside `path`, which takes its place when the body ends."""
  temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes bytes and waits until they are on the disk."""
  with replacing(path) as temporary, temporary.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes text as UTF-8 and waits until it is on the disk."""
  write_bytes(path, text.encode("utf-8"))


def write_json(path: pathlib.Path, value: Any, every_process: bool = False) -> None:
  """Writes JSON; only the first of several processes does, or `every_process`."""
  from qlora_jax.parallel import processes  # JAX, which most writers of files do without

  if every_process or processes.is_first():
    write_text(path, json.dumps(value, default=list, indent=1))


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Exclusive lock on `path` between processes; released when its holder exits."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path.with_name(f".{path.name}.lock"), "w") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
