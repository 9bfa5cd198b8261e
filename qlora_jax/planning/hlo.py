"""Reads collectives and saved activations from the text (HLO) of a compiled program.

The body of a loop occurs once in the text, so its instructions are multiplied by the loop's trip
count. The count is an attribute of the loop, or the constant with which its condition compares a
counter that starts at 0.
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
  """One line of a computation: name, type, opcode, and the remaining text."""

  name: str
  type: str
  opcode: str
  rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a step.

  Attributes:
    kind: one of `KINDS`.
    bytes: size of the whole array that a group of chips produces or exchanges, per execution.
    group: number of chips per group.
    times: executions per step.
    across: whether a group spans slices, so that it uses the network of the data centre.
    source: its origin in the model, from the compiler's metadata.
  """

  kind: str
  bytes: int
  group: int
  times: int
  across: bool
  source: str

  @property
  def wire(self) -> float:
    """Bytes that a chip receives per execution, with ring algorithms."""
    if self.kind == "collective-permute":
      return float(self.bytes)
    share = (self.group - 1) / self.group
    return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The instructions of every computation by its name, and the name of the entry computation."""
  bodies: dict[str, list[Instruction]] = {}
  entry, name = "", ""
  for line in text.splitlines():
    if not line.startswith(" ") and (head := _HEAD.match(line)):
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif name and (parsed := _INSTRUCTION.match(line)):
      bodies[name].append(Instruction(*parsed.groups()))
  return bodies, entry


def size(shape: str) -> int:
  """Bytes of a type such as 'bf16[16,8192]{1,0}'; for a tuple the sum over its parts."""
  return sum(count for _, count in _arrays(shape))


def _arrays(shape: str) -> list[tuple[tuple[int, ...], int]]:
  """(dimensions, bytes) of each array in a type."""
  arrays = []
  for dtype, dims in _SHAPE.findall(shape):
    if dtype in _BYTES:
      sizes = tuple(int(dim) for dim in dims.split(",") if dim)
      arrays.append((sizes, int(math.prod(sizes) * _BYTES[dtype])))
  return arrays


def visited(text: str) -> Iterator[tuple[Instruction, int, str]]:
  """(instruction, executions per step, computation) of every instruction that runs."""
  bodies, entry = computations(text)
  stack = [(entry, 1)]
  while stack:
    name, times = stack.pop()
    for instruction in bodies.get(name, ()):
      yield instruction, times, name
      if instruction.opcode.endswith(("-done", "-update")):
        continue  # the computations that it names were visited at its -start
      trips = 1
      if instruction.opcode == "while":
        trips = _trips(instruction, bodies)
      called = _CALLED.findall(instruction.rest)
      if branches := _BRANCHES.search(instruction.rest):
        called += re.findall(r"[\w.\-]+", branches[1])
      if instruction.opcode in (
        "all-reduce",
        "reduce-scatter",
        "all-reduce-start",
        "reduce",
        "sort",
      ):
        called = []  # only the scalar function, such as a sum
      stack += [(computation, times * trips) for computation in called]


def _trips(loop: Instruction, bodies: dict[str, list[Instruction]]) -> int:
  """The number of executions of a loop's body; 1 if it depends on data."""
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  matched = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  condition = bodies.get(matched[1] if matched else "", ())
  compares = [line for line in condition if line.opcode == "compare"]
  if len(compares) != 1 or "direction=LT" not in compares[0].rest:
    return 1
  limits = [
    line.rest
    for line in condition
    if line.opcode == "constant" and re.search(rf"%?{re.escape(line.name)}[,)]", compares[0].rest)
  ]
  number = re.match(r"(\d+)\)", limits[0]) if len(limits) == 1 else None
  return int(number[1]) if number else 1


def collectives(text: str, chips_per_slice: int = 0) -> list[Collective]:
  """Every collective of a compiled step.

  Args:
    text: of the compiled program.
    chips_per_slice: 0 for one slice.
  """
  result = []
  for instruction, times, computation in visited(text):
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    groups = _groups(instruction.rest)
    group_size = len(groups[0]) if groups else 1
    if group_size < 2:
      continue
    arrays = _arrays(instruction.type)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
      # The type is a tuple of operands and results; a permute has two more scalars.
      arrays = [array for array in arrays if array[0]]
      arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[:1]
    whole = sum(count for _, count in arrays)
    if kind == "reduce-scatter":
      whole *= group_size
    elif kind == "all-reduce" and "all-reduce-scatter" in computation:
      kind = "reduce-scatter"  # a fusion in which each chip keeps a part of the sum
    across = bool(chips_per_slice) and any(
      len({device // chips_per_slice for device in group}) > 1 for group in groups
    )
    op_name = re.search(r'op_name="([^"]*)"', instruction.rest)
    source = op_name[1] if op_name else ""
    result.append(Collective(kind, whole, group_size, times, across, source))
  return result


def _groups(rest: str) -> list[list[int]]:
  """The groups of devices of a collective; pairs for a permute."""
  if listed := (_LIST_GROUPS.search(rest) or _PAIRS.search(rest)):
    return [
      [int(device) for device in group.split(",")]
      for group in re.findall(r"\{([\d, ]+)\}", listed[1])
    ]
  if named := _MESH_GROUPS.search(rest):
    axes = [part.split("=") for part in named[1].split(",")]
    sizes = [int(size) for _, size in axes]
    devices = _iota(named[2], named[3], sizes).reshape(sizes)
    names = [name.strip("' ") for name, _ in axes]
    group_axes = [names.index(part.strip("' ")) for part in named[4].split(",")]
    other_axes = [axis for axis in range(len(names)) if axis not in group_axes]
    count = math.prod(sizes[axis] for axis in group_axes)
    return devices.transpose(other_axes + group_axes).reshape(-1, count).tolist()
  if iota := _IOTA_GROUPS.search(rest):
    return _iota(iota[3], iota[4], []).reshape(int(iota[1]), int(iota[2])).tolist()
  return []


def _iota(dims: str | None, order: str | None, sizes: list[int]) -> np.ndarray:
  """Devices 0, 1, .. in an array of shape `dims` (by default `sizes`), transposed to `order`."""
  shape = [int(dim) for dim in dims.split(",")] if dims else sizes
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices.transpose([int(axis) for axis in order.split(",")]) if order else devices


def saved_bytes(text: str, trips: int, excluded: set[tuple[int, ...]]) -> int:
  """Bytes of the arrays [trips, ..] that the first loop over the blocks returns.

  These are the activations that the forward pass saves for the gradient.

  Args:
    text: of the compiled program.
    trips: number of blocks.
    excluded: shapes [trips, ..] of a chip's shards of the step's arguments.
  """
  bodies, _ = computations(text)
  for instruction, _, _ in visited(text):
    if instruction.opcode == "while" and _trips(instruction, bodies) == trips:
      return sum(
        count
        for dims, count in _arrays(instruction.type)
        if len(dims) > 1 and dims[0] == trips and dims not in excluded
      )
  return 0
