"""A trained adapter as one folder: `adapter.safetensors` and `adapter.json`.

The tensors are the tree's leaves under their paths, joined by '/'. The JSON says what the adapter
is, which base it was trained on, and lists every tensor, so that a folder which lost something is
refused with a list of what it lost.

Saving writes a temporary folder beside the target, moves the old adapter aside and the new one in.
If the process dies between the two moves, the next `load` or `save` puts the old adapter back:
what is read is always the whole old or the whole new adapter.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

import qlora_jax
from qlora_jax import errors
from qlora_jax.typing import PyTree

TENSORS = "adapter.safetensors"
DESCRIPTION = "adapter.json"
FORMAT = 1
REQUIRED = ("adapter", "model_name", "model_config", "base_fingerprint")


def save(directory: str | pathlib.Path, params: PyTree, metadata: Mapping[str, Any]) -> None:
  """Writes an adapter, replacing the one in `directory` whole or not at all.

  Args:
    directory: the adapter's folder; its parents are made.
    params: nested mappings of arrays of any float or integer type, bfloat16 included. Whatever is
      needed beside the adapter's own parameters, such as an instruction projection, goes in here.
    metadata: JSON values with the keys of `REQUIRED`: the adapter's config, the base's name,
      config and `Source.fingerprint`; others, such as a summary of the training, are kept.

  Raises:
    UserError: `directory` holds something that is not an adapter, or cannot be written.
    ValueError: a key is missing from `metadata`, or `params` is not a tree of named arrays.
  """
  missing = [key for key in REQUIRED if key not in metadata]
  if missing:
    raise ValueError(f"adapter metadata lack {', '.join(missing)}")
  tensors = flatten(params)
  target = pathlib.Path(directory).absolute()
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    _check_replaceable(target)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
      _write(temporary, tensors, metadata)
      _swap(temporary, target)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  except OSError as error:
    raise errors.UserError(f"adapter {directory}: cannot be written: {error.strerror}") from None


def load(
  directory: str | pathlib.Path,
  expected_fingerprint: str | None,
  *,
  base_name: str = "the given base",
  expected: PyTree | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads an adapter.

  Args:
    directory: the adapter's folder.
    expected_fingerprint: `Source.fingerprint` of the base it is to run on; None does not ask.
    base_name: that base's name, for the message.
    expected: a tree of arrays or `jax.ShapeDtypeStruct`, the parameters that the caller's model
      has; None does not ask.

  Returns:
    The tree of NumPy arrays in the types they were saved in, and the metadata.

  Raises:
    UserError: no adapter there; it belongs to another base; tensors are missing, extra, damaged or
      of another shape or type (all are listed).
  """
  target = pathlib.Path(directory).absolute()
  _recover(target)
  description = _read_description(target)
  metadata = description["metadata"]
  theirs = metadata["base_fingerprint"]
  if expected_fingerprint is not None and theirs != expected_fingerprint:
    raise errors.UserError(
      f"adapter {directory}: was trained on {metadata['model_name']} (fingerprint {theirs[:16]}), "
      f"not on {base_name} (fingerprint {expected_fingerprint[:16]})"
    )
  tensors = _read_tensors(target / TENSORS)
  listed = description["tensors"]
  found = {name: _signature(value) for name, value in tensors.items()}
  _compare(f"adapter {directory}: {TENSORS}", found, listed)
  damaged = [name for name, value in tensors.items() if _digest(value) != listed[name]["sha256"]]
  if damaged:
    raise errors.UserError(f"adapter {directory}: {TENSORS} is damaged in {', '.join(damaged)}")
  if expected is not None:
    wanted = {name: _signature(leaf) for name, leaf in _leaves(expected)}
    _compare(f"adapter {directory}: does not fit the model", found, wanted)
  return unflatten(tensors), metadata


def flatten(params: PyTree) -> dict[str, np.ndarray]:
  """Leaves by path, joined by '/'. Raises ValueError for anything but nested mappings of arrays."""
  tensors = {}
  for name, leaf in _leaves(params):
    value = np.asarray(jax.device_get(leaf))
    if value.dtype == object:
      raise ValueError(f"adapter parameter {name} is a {type(leaf).__name__}, not an array")
    tensors[name] = np.ascontiguousarray(value).reshape(value.shape)
  if not tensors:
    raise ValueError("an adapter has at least one parameter")
  return tensors


def unflatten(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries from names joined by '/'."""
  tree: dict[str, Any] = {}
  for name, value in tensors.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def _leaves(tree: PyTree, prefix: str = "") -> list[tuple[str, Any]]:
  if not isinstance(tree, Mapping):
    return [(prefix, tree)]
  leaves = []
  for key in sorted(tree):
    if not isinstance(key, str) or not key or "/" in key:
      raise ValueError(f"adapter parameter {prefix}: the name {key!r} cannot be part of a path")
    leaves += _leaves(tree[key], f"{prefix}/{key}" if prefix else key)
  return leaves


def _write(
  folder: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
  listed = {name: {**_signature(v), "sha256": _digest(v)} for name, v in tensors.items()}
  description = {
    "format": FORMAT,
    "library": {"name": "qlora_jax", "version": qlora_jax.__version__},
    "metadata": dict(metadata),
    "tensors": listed,
  }
  (folder / TENSORS).write_bytes(safetensors_numpy.save(dict(tensors)))
  (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
  folder.chmod(0o755)  # mkdtemp makes it private
  for path in (folder / TENSORS, folder / DESCRIPTION, folder):
    _flush(path)


def _swap(new: pathlib.Path, target: pathlib.Path) -> None:
  aside = _aside(target)
  if target.exists():
    target.rename(aside)
  new.rename(target)
  _flush(target.parent)
  shutil.rmtree(aside, ignore_errors=True)


def _recover(target: pathlib.Path) -> None:
  """Finishes what a killed `save` left: the adapter that was moved aside comes back."""
  aside = _aside(target)
  try:
    if not target.exists():
      aside.rename(target)
    elif aside.exists():
      shutil.rmtree(aside, ignore_errors=True)
  except FileNotFoundError:
    pass  # nothing was aside


def _aside(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(f".{target.name}.replaced")


def _check_replaceable(target: pathlib.Path) -> None:
  if target.is_dir():
    others = sorted({path.name for path in target.iterdir()} - {TENSORS, DESCRIPTION})
    if others:
      raise errors.UserError(
        f"adapter {target}: the folder holds other files ({others[0]}); choose another folder"
      )
  elif target.exists():
    raise errors.UserError(f"adapter {target}: is a file; choose a folder")


def _read_description(target: pathlib.Path) -> dict[str, Any]:
  path = target / DESCRIPTION
  try:
    description = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise errors.UserError(f"adapter {path}: cannot be read: {error.strerror}") from None
  except ValueError as error:
    raise errors.UserError(f"adapter {path}: is damaged or truncated: {error}") from None
  if not isinstance(description, dict) or description.get("format") != FORMAT:
    found = description.get("format") if isinstance(description, dict) else None
    raise errors.UserError(f"adapter {path}: has the format {found!r}; this version reads {FORMAT}")
  metadata, tensors = description.get("metadata"), description.get("tensors")
  lacking = [key for key in REQUIRED if not isinstance(metadata, dict) or key not in metadata]
  entries = tensors.values() if isinstance(tensors, dict) else [None]
  if lacking or not all(isinstance(e, dict) and "sha256" in e for e in entries):
    what = f"lacks {', '.join(lacking)}" if lacking else "does not list its tensors"
    raise errors.UserError(f"adapter {path}: {what}")
  return description


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors_numpy.load_file(path)  # `load` does not know bfloat16
  except OSError as error:
    raise errors.UserError(f"adapter {path}: cannot be read: {error.strerror}") from None
  except safetensors.SafetensorError as error:
    reason = " ".join(str(error).split())[:160]
    raise errors.UserError(f"adapter {path}: is damaged or truncated: {reason}") from None


def _compare(subject: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
  problems += [f"extra {name}" for name in sorted(found.keys() - wanted.keys())]
  for name in sorted(found.keys() & wanted.keys()):
    have, want = found[name], wanted[name]
    if any(have[key] != want.get(key) for key in ("shape", "dtype")):
      problems.append(
        f"{name} is {have['dtype']} {have['shape']}, not {want.get('dtype')} {want.get('shape')}"
      )
  if problems:
    raise errors.UserError(f"{subject}: {'; '.join(problems)}")


def _signature(value: Any) -> dict[str, Any]:
  return {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}


def _digest(value: np.ndarray) -> str:
  return hashlib.sha256(value.tobytes()).hexdigest()


def _flush(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
