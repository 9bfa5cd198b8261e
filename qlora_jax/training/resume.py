"""Which fields of a config may change between the parts of a run, and which other ones did."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections

# A whole work directory: fields that change no result, see `workloads.workload.Cohort.identity`.
STUDY = ("checkpoint", "mesh", "model.attention", "data.data_dir")
# A trial that resumes: also fields about its evaluation, and about which trials there are.
RUN = (*STUDY, "data.manual_folder", "eval", "protocol", "variant")
_SHOWN = 6  # fields that a message lists


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """A config as it comes back from JSON."""
  return json.loads(json.dumps(config.to_dict(), default=list))


def differences(
  stored: dict[str, Any], new: dict[str, Any], free: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
  """(path, stored value, new value) of every field that differs, by path.

  Args:
    stored, new: plain configs; a field that one of them lacks counts as None there.
    free: paths of fields and groups that may differ.
  """
  free = tuple(free)
  differing = [
    difference
    for difference in _walk(stored, new, "")
    if not any(difference[0] == path or difference[0].startswith(f"{path}.") for path in free)
  ]
  return sorted(differing, key=lambda difference: difference[0])


def described(differing: list[tuple[str, Any, Any]]) -> str:
  """The differences in words, on one line."""
  shown = [f"{path} was {_short(was)}, is {_short(now)}" for path, was, now in differing[:_SHOWN]]
  more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
  return "; ".join(shown) + more


def _walk(stored: Any, new: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
  if isinstance(stored, dict) and isinstance(new, dict):
    for key in stored.keys() | new.keys():
      path = f"{prefix}.{key}" if prefix else key
      yield from _walk(stored.get(key), new.get(key), path)
  elif stored != new:
    yield prefix, stored, new


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
