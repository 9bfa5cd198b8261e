"""Embeddings on disk: every (encoder, text) is encoded once per machine.

One file per text, `<cache_dir>/<encoder fingerprint>/<SHA-256 of the text>.f32`: a 32-byte
checksum, then `dim` little-endian float32. A changed weight file has another fingerprint, so
nothing is ever stale. A file appears whole (temporary file, then `os.replace`), so several
processes may share a folder: at worst both encode the same text and the last write wins.
"""

import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from qlora_jax import errors, files
from qlora_jax.instructions import encoders

_CHECKSUM_BYTES = 32


def default_dir() -> pathlib.Path:
  """`$XDG_CACHE_HOME/qlora_jax/instructions`, or the same under `~/.cache`."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base, "qlora_jax", "instructions")


def embed(
  texts: Sequence[str], encoder: str = "minilm", cache_dir: str | os.PathLike | None = None
) -> np.ndarray:
  """Embeddings of texts from the cache; missing ones are encoded and stored.

  The encoder is loaded only if some text is missing. A file of the wrong length or checksum
  counts as missing and is written anew.

  Args:
    texts: n texts, repetitions allowed.
    encoder: one of `encoders.NAMES`.
    cache_dir: folder of the cache; `default_dir()` when None.

  Returns:
    float32 [n, dim], unit rows, in the order of `texts`.

  Raises:
    UserError: unknown encoder, missing wheel, or a folder that cannot be written.
  """
  if isinstance(texts, str):
    raise TypeError("embed takes a sequence of texts, not one text")
  folder = pathlib.Path(cache_dir or default_dir(), encoders.fingerprint(encoder))
  dim = encoders.dim(encoder)

  paths = {text: folder / f"{_key(text)}.f32" for text in texts}
  found = {text: _read(path, dim) for text, path in paths.items()}
  missing = [text for text, embedding in found.items() if embedding is None]
  if missing:
    new = encoders.create(encoder).encode(missing)
    for text, embedding in zip(missing, new, strict=True):
      found[text] = embedding
      _write(paths[text], embedding)
  return np.stack([found[text] for text in texts]) if paths else np.zeros((0, dim), np.float32)


def _key(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: pathlib.Path, payload: bytes) -> bytes:
  # With the names of file and folder in it, a file that was moved is recognised as damaged too.
  return hashlib.sha256(f"{path.parent.name}/{path.name}".encode() + payload).digest()


def _read(path: pathlib.Path, dim: int) -> np.ndarray | None:
  try:
    content = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None  # in the second case writing will explain
  checksum, payload = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
  if len(payload) != 4 * dim or checksum != _checksum(path, payload):
    return None
  return np.frombuffer(payload, "<f4").astype(np.float32)


def _write(path: pathlib.Path, embedding: np.ndarray) -> None:
  payload = embedding.astype("<f4").tobytes()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, _checksum(path, payload) + payload)
  except OSError as error:
    raise errors.UserError(
      f"cache_dir: cannot write {path.parent} ({error.strerror}); name a writable folder"
    ) from error
