"""A trained adapter as one folder: `adapter.safetensors` and `adapter.json`.

A tensor's name is the path of its leaf in the tree, joined by '/'. The JSON file describes the
adapter and its base model, and lists every tensor. Loading therefore detects missing and damaged
tensors, and the error message lists them.

Saving writes a temporary folder beside the target, renames the old adapter's folder, and then
renames the new folder to the target. If the process dies between the two renames, the next `load`
or `save` restores the old adapter. A reader sees the complete old or the complete new adapter.
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
  """Writes an adapter; replaces an adapter in `directory` completely or not at all.

  Args:
    directory: the adapter's folder; parent folders are created.
    params: nested mappings of arrays of any float or integer dtype, including bfloat16. They
      include other arrays that the adapter needs, such as an instruction projection.
    metadata: JSON values with the keys of `REQUIRED`: the adapter's config, and the base's name,
      config and `Source.fingerprint`. Other keys, such as a training summary, are stored too.

  Raises:
    UserError: `directory` contains other files, or cannot be written.
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
      _replace_target(temporary, target)
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
    expected_fingerprint: `Source.fingerprint` of the base to run on; None skips this check.
    base_name: the name of this base, for the error message.
    expected: a tree of arrays or `jax.ShapeDtypeStruct`, the parameters of the caller's model;
      None skips this check.

  Returns:
    The tree of NumPy arrays with their saved dtypes, and the metadata.

  Raises:
    UserError: there is no adapter; it was trained on another base; tensors are missing, extra,
      damaged or have another shape or dtype (the message lists all of them).
  """
  target = pathlib.Path(directory).absolute()
  _recover(target)
  description = _read_description(target)
  metadata = description["metadata"]
  base_fingerprint = metadata["base_fingerprint"]
  if expected_fingerprint is not None and base_fingerprint != expected_fingerprint:
    raise errors.UserError(
      f"adapter {directory}: was trained on {metadata['model_name']} (fingerprint"
      f" {base_fingerprint[:16]}), not on {base_name} (fingerprint {expected_fingerprint[:16]})"
    )
  tensors = _read_tensors(target / TENSORS)
  listed_tensors = description["tensors"]
  signatures = {name: _signature(value) for name, value in tensors.items()}
  _compare(f"adapter {directory}: {TENSORS}", signatures, listed_tensors)
  damaged_tensors = [
    name for name, value in tensors.items() if _digest(value) != listed_tensors[name]["sha256"]
  ]
  if damaged_tensors:
    raise errors.UserError(
      f"adapter {directory}: {TENSORS} is damaged in {', '.join(damaged_tensors)}"
    )
  if expected is not None:
    expected_signatures = {name: _signature(leaf) for name, leaf in _leaves(expected)}
    _compare(f"adapter {directory}: does not fit the model", signatures, expected_signatures)
  return unflatten(tensors), metadata


def flatten(params: PyTree) -> dict[str, np.ndarray]:
  """Leaves by path, joined by '/'. Raises ValueError if a leaf is not an array."""
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
  """Nested dictionaries from names that are joined by '/'."""
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
  listed_tensors = {
    name: {**_signature(value), "sha256": _digest(value)} for name, value in tensors.items()
  }
  description = {
    "format": FORMAT,
    "library": {"name": "qlora_jax", "version": qlora_jax.__version__},
    "metadata": dict(metadata),
    "tensors": listed_tensors,
  }
  (folder / TENSORS).write_bytes(safetensors_numpy.save(dict(tensors)))
  (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
  folder.chmod(0o755)  # mkdtemp creates it private
  for path in (folder / TENSORS, folder / DESCRIPTION, folder):
    _flush(path)


def _replace_target(new: pathlib.Path, target: pathlib.Path) -> None:
  renamed = _renamed_path(target)
  if target.exists():
    target.rename(renamed)
  new.rename(target)
  _flush(target.parent)
  shutil.rmtree(renamed, ignore_errors=True)


def _recover(target: pathlib.Path) -> None:
  """Cleans up after a killed `save`: restores or deletes the renamed old adapter."""
  renamed = _renamed_path(target)
  try:
    if not target.exists():
      renamed.rename(target)
    elif renamed.exists():
      shutil.rmtree(renamed, ignore_errors=True)
  except FileNotFoundError:
    pass  # there is no renamed adapter


def _renamed_path(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(f".{target.name}.replaced")


def _check_replaceable(target: pathlib.Path) -> None:
  if target.is_dir():
    other_files = sorted({path.name for path in target.iterdir()} - {TENSORS, DESCRIPTION})
    if other_files:
      raise errors.UserError(
        f"adapter {target}: the folder contains other files ({other_files[0]}); choose another"
        " folder"
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
    stored_format = description.get("format") if isinstance(description, dict) else None
    raise errors.UserError(
      f"adapter {path}: has the format {stored_format!r}; this version reads {FORMAT}"
    )
  metadata, tensors = description.get("metadata"), description.get("tensors")
  missing_keys = [key for key in REQUIRED if not isinstance(metadata, dict) or key not in metadata]
  tensor_entries = tensors.values() if isinstance(tensors, dict) else [None]
  if missing_keys or not all(
    isinstance(entry, dict) and "sha256" in entry for entry in tensor_entries
  ):
    problem = f"lacks {', '.join(missing_keys)}" if missing_keys else "does not list its tensors"
    raise errors.UserError(f"adapter {path}: {problem}")
  return description


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors_numpy.load_file(path)  # `load` does not support bfloat16
  except OSError as error:
    raise errors.UserError(f"adapter {path}: cannot be read: {error.strerror}") from None
  except safetensors.SafetensorError as error:
    reason = " ".join(str(error).split())[:160]
    raise errors.UserError(f"adapter {path}: is damaged or truncated: {reason}") from None


def _compare(subject: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
  problems = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
  problems += [f"extra {name}" for name in sorted(actual.keys() - expected.keys())]
  for name in sorted(actual.keys() & expected.keys()):
    actual_signature, expected_signature = actual[name], expected[name]
    if any(actual_signature[key] != expected_signature.get(key) for key in ("shape", "dtype")):
      problems.append(
        f"{name} is {actual_signature['dtype']} {actual_signature['shape']}, not"
        f" {expected_signature.get('dtype')} {expected_signature.get('shape')}"
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
