"""Collectives and kept states of a compiled program, read from its text (HLO).

A loop's body stands once in the text: what is in it is multiplied by the loop's trip count, which
is written beside the loop, or is the constant that its condition compares a counter from 0 with.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "s16": 2,
  "u16": 2,
  "f16": 2,
  "bf16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
  "c64": 8,
}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)')
_LIST_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: name, type, opcode, and the rest of the line."""

  name: str
  type: str
  opcode: str
  rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a step.

  Attributes:
    kind: of `KINDS`.
    bytes: of the whole array that a group of chips makes or exchanges, each time.
    group: chips that take part together.
    times: how often a step runs it.
    across: whether its group spans slices, so that it runs over the data centre's network.
    source: where in the model it comes from, as the compiler noted it.
  """

  kind: str
  bytes: int
  group: int
  times: int
  across: bool
  source: str

  @property
  def wire(self) -> float:
    """Bytes that a chip receives each time, by the ring algorithms."""
    if self.kind == "collective-permute":
      return float(self.bytes)
    share = (self.group - 1) / self.group
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The instructions of every computation, and the name of the entry."""
  found: dict[str, list[Instruction]] = {}
  entry, name = "", ""
  for line in text.splitlines():
    if not line.startswith(" ") and (head := _HEAD.match(line)):
      name = head[2]
      found[name] = []
      entry = name if head[1] else entry
    elif name and (parsed := _INSTRUCTION.match(line)):
      found[name].append(Instruction(*parsed.groups()))
  return found, entry


def size(shape: str) -> int:
  """Bytes of a type such as 'bf16[16,8192]{1,0}'; of a tuple, of all its parts."""
  return sum(each[1] for each in _arrays(shape))


def _arrays(shape: str) -> list[tuple[tuple[int, ...], int]]:
  """(dimensions, bytes) of each array of a type."""
  found = []
  for dtype, dims in _SHAPE.findall(shape):
    if dtype in _BYTES:
      sizes = tuple(int(each) for each in dims.split(",") if each)
      found.append((sizes, int(math.prod(sizes) * _BYTES[dtype])))
  return found


def visited(text: str) -> Iterator[tuple[Instruction, int, str]]:
  """(instruction, times a step, computation) of everything that runs, loops multiplied out."""
  found, entry = computations(text)
  stack = [(entry, 1)]
  while stack:
    name, times = stack.pop()
    for each in found.get(name, ()):
      yield each, times, name
      if each.opcode.endswith(("-done", "-update")):
        continue  # its start has been followed
      trips = 1
      if each.opcode == "while":
        trips = _trips(each, found)
      called = _CALLED.findall(each.rest)
      if branches := _BRANCHES.search(each.rest):
        called += re.findall(r"[\w.\-]+", branches[1])
      if each.opcode in ("all-reduce", "reduce-scatter", "all-reduce-start", "reduce", "sort"):
        called = []  # the sum itself
      stack += [(other, times * trips) for other in called]


def _trips(loop: Instruction, found: dict[str, list[Instruction]]) -> int:
  """How often a loop runs its body; 1 where that depends on data."""
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  lines = {each.name: each for each in found.get(condition[1] if condition else "", ())}
  compare = [each for each in lines.values() if each.opcode == "compare"]
  if len(compare) != 1 or "direction=LT" not in compare[0].rest:
    return 1
  limits = [
    each.rest
    for name, each in lines.items()
    if each.opcode == "constant" and re.search(rf"%?{re.escape(name)}[,)]", compare[0].rest)
  ]
  number = re.match(r"(\d+)\)", limits[0]) if len(limits) == 1 else None
  return int(number[1]) if number else 1


def collectives(text: str, chips_a_slice: int = 0) -> list[Collective]:
  """Every collective of a compiled step.

  Args:
    text: of the compiled program.
    chips_a_slice: 0 where there is one slice.
  """
  found = []
  for each, times, computation in visited(text):
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    groups = _groups(each.rest)
    length = len(groups[0]) if groups else 1
    if length < 2:
      continue
    arrays = _arrays(each.type)
    if each.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
      # A tuple of operands and results; permutes carry two words of context too.
      arrays = [array for array in arrays if array[0]]
      arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[:1]
    whole = sum(array[1] for array in arrays)
    if kind == "reduce-scatter":
      whole *= length
    elif kind == "all-reduce" and "all-reduce-scatter" in computation:
      kind = "reduce-scatter"  # a fusion that keeps its own part of the sum
    across = bool(chips_a_slice) and any(
      len({device // chips_a_slice for device in group}) > 1 for group in groups
    )
    source = re.search(r'op_name="([^"]*)"', each.rest)
    found.append(Collective(kind, whole, length, times, across, source[1] if source else ""))
  return found


def _groups(rest: str) -> list[list[int]]:
  """The groups of devices that take part together; pairs for a permute."""
  if listed := (_LIST_GROUPS.search(rest) or _PAIRS.search(rest)):
    return [
      [int(each) for each in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])
    ]
  if named := _MESH_GROUPS.search(rest):
    axes = [part.split("=") for part in named[1].split(",")]
    sizes = [int(size) for _, size in axes]
    devices = _iota(named[2], named[3], sizes).reshape(sizes)
    names = [name.strip("' ") for name, _ in axes]
    together = [names.index(part.strip("' ")) for part in named[4].split(",")]
    rest_axes = [place for place in range(len(names)) if place not in together]
    count = math.prod(sizes[place] for place in together)
    return devices.transpose(rest_axes + together).reshape(-1, count).tolist()
  if iota := _IOTA_GROUPS.search(rest):
    return _iota(iota[3], iota[4], []).reshape(int(iota[1]), int(iota[2])).tolist()
  return []


def _iota(dims: str | None, order: str | None, sizes: list[int]) -> np.ndarray:
  """Devices 0, 1, .. laid out as [dims] (else `sizes`) and transposed to `order`."""
  shape = [int(each) for each in dims.split(",")] if dims else sizes
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices.transpose([int(each) for each in order.split(",")]) if order else devices


def kept_bytes(text: str, trips: int, excluded: set[tuple[int, ...]]) -> int:
  """Bytes of the arrays [trips, ..] that the first loop over the blocks leaves behind.

  They are what the forward pass keeps for the gradient.

  Args:
    text: of the compiled program.
    trips: blocks.
    excluded: shapes [trips, ..] of a chip's own shards of the step's arguments.
  """
  found, _ = computations(text)
  for each, _, _ in visited(text):
    if each.opcode == "while" and _trips(each, found) == trips:
      return sum(
        count
        for dims, count in _arrays(each.type)
        if len(dims) > 1 and dims[0] == trips and dims not in excluded
      )
  return 0
