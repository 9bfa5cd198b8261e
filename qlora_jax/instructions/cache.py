"""Disk cache of embeddings: every (encoder, text) is encoded once per machine.

The cache has one file per text, `<cache_dir>/<encoder fingerprint>/<SHA-256 of the text>.f32`: a
32-byte checksum, then `dim` little-endian float32. A changed weight file has another fingerprint,
so the cache has no stale entries. Writes are atomic (temporary file, then `os.replace`), so several
processes can share a folder. If two processes encode the same text, the last write remains.
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
  """Embeddings of texts from the cache; encodes and stores missing ones.

  The encoder is loaded only if a text is missing. A file with a wrong length or checksum counts as
  missing and is replaced.

  Args:
    texts: n texts; repetitions are allowed.
    encoder: one of `encoders.NAMES`.
    cache_dir: folder of the cache; None for `default_dir()`.

  Returns:
    float32 [n, dim], unit rows, in the order of `texts`.

  Raises:
    UserError: an unknown encoder, a missing wheel, or a folder that cannot be written.
    TypeError: `texts` is a single text.
  """
  if isinstance(texts, str):
    raise TypeError("embed takes a sequence of texts, not one text")
  folder = pathlib.Path(cache_dir or default_dir(), encoders.fingerprint(encoder))
  dim = encoders.dim(encoder)

  paths = {text: folder / f"{_key(text)}.f32" for text in texts}
  embeddings = {text: _read(path, dim) for text, path in paths.items()}
  missing = [text for text, embedding in embeddings.items() if embedding is None]
  if missing:
    new_embeddings = encoders.create(encoder).encode(missing)
    for text, embedding in zip(missing, new_embeddings, strict=True):
      embeddings[text] = embedding
      _write(paths[text], embedding)
  return np.stack([embeddings[text] for text in texts]) if paths else np.zeros((0, dim), np.float32)


def _key(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: pathlib.Path, payload: bytes) -> bytes:
  # The names of file and folder are part of it, so that a moved file counts as damaged too.
  return hashlib.sha256(f"{path.parent.name}/{path.name}".encode() + payload).digest()


def _read(path: pathlib.Path, dim: int) -> np.ndarray | None:
  try:
    content = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None  # after NotADirectoryError, `_write` raises an error with the reason
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
