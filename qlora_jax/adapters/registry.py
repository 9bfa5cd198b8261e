"""The record of an adapter family, and the registry that everything asks for it.

A family is one file in `methods/`, which declares one or more `Method` records. The factory, the
sizing, the planner, the optimiser, the statistics and the report read the records; none of them
names a family. `docs/new_adapter.md` is a worked example.
"""

import dataclasses
import fnmatch
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qlora_jax import errors


@dataclasses.dataclass(frozen=True)
class Preset:
  """A named adapter config, and its looks in every figure and table.

  Attributes:
    name: `adapter.name` in a config.
    fields: fields of `AdapterConfig` that it sets, besides `family`.
    label: the name in figures and tables.
    color: a hex string; it tells the family.
    line, marker: matplotlib's; they tell the members of a family apart.
    main: whether it is drawn in front where all would not fit.
    description: one line for the report.
  """

  name: str
  label: str
  color: str
  line: str | tuple = "-"
  marker: str | tuple = "o"
  main: bool = False
  description: str = ""
  fields: Mapping[str, object] = dataclasses.field(default_factory=dict)


class SharedLeaf(NamedTuple):
  """A parameter that the whole network shares: its name, initialiser, logical axes and shape."""

  name: str
  initializer: Callable[..., Any]
  axes: tuple[str, ...]
  shape: tuple[int, ...]


# (adapter's config, R of the map, D_in, D_out) -> a number of one adapted map
OfMap = Callable[[Any, int, int, int], float]


@dataclasses.dataclass(frozen=True)
class Method:
  """A family of adapters. Letters as in `qlora_jax/typing.py`.

  Attributes:
    name: `AdapterConfig.family`.
    presets: the named configs of this family, in the order of sweeps.
    branch: subclass of `branch.Branch` that corrects one adapted map; None adapts no map.
    map_parameters: trainable parameters of one map.
    map_flops: FLOPs per token of one map, forward, without the frozen product.
    learning_rate: of a language model whose config gives none.
    legend: names of `presets` in the order of legends and tables, if it is another one.
    trains_base: whether the base itself is trained (full fine-tuning).
    scaling: overrides `AdapterConfig.scaling` ('' keeps it).
    router: where routing weights are made: '' nowhere, per 'map' or per 'block'. A 'block' has the
      query, the prior and the memory of atoms of Queryable LoRA.
    shared: (config, (name, D_out, its logical axis) of every map of a layer) -> the parameters that
      the network shares, in the order in which they are drawn. All maps then have one rank.
    block_parameters: (config, adapted maps per layer) -> parameters of one block's routers.
    routing_flops: (config, blocks, layers per block, adapted maps per layer) -> FLOPs per token of
      all routing, forward.
    certified: whether scaling ||A|| ||B|| max_m ||U_m|| bounds the update
      (`statistics.update_norms`); its leaves are `lora_a`, `lora_b`, and `atoms` where it routes.
    decayed: names, with wildcards, of leaves with weight decay. Decay pulls towards zero: list the
      leaves whose zero is the frozen base.
    mixed: names, with wildcards, of leaves [.., M, ..] that routing weights mix.
  """

  name: str
  presets: tuple[Preset, ...]
  branch: type | None
  map_parameters: OfMap
  map_flops: OfMap
  learning_rate: float
  legend: tuple[str, ...] = ()
  trains_base: bool = False
  scaling: str = ""
  router: str = ""
  shared: Callable[[Any, tuple[tuple[str, int, str], ...]], list[SharedLeaf]] | None = None
  block_parameters: Callable[[Any, int], int] | None = None
  routing_flops: Callable[[Any, int, int, int], float] | None = None
  certified: bool = False
  decayed: tuple[str, ...] = ("lora_a", "lora_b")
  mixed: tuple[str, ...] = ()


@functools.cache
def _registered() -> dict[str, Method]:
  # Loaded by name at the first look-up, as plug-ins are: the families import this module, and
  # configs that only name an adapter do not wait for JAX.
  methods = importlib.import_module(f"{__package__}.methods")
  return {method.name: method for method in methods.BUILT_IN}


def register(method: Method) -> None:
  """Makes a family known, in this process.

  Raises:
    errors.UserError: its name, or that of one of its presets, is taken.
  """
  taken = {*_registered(), *presets()}.intersection(
    {method.name, *(preset.name for preset in method.presets)}
  )
  if taken:
    raise errors.UserError(f"adapter method {method.name!r}: {min(taken)!r} is registered already")
  _registered()[method.name] = method


def unregister(name: str) -> None:
  """Forgets the family `name`."""
  del _registered()[name]


def families() -> tuple[Method, ...]:
  """All families, in the order of tables."""
  return tuple(_registered().values())


def get(name: str) -> Method:
  """The family `name`; KeyError for an unknown one."""
  return _registered()[name]


def presets() -> dict[str, Preset]:
  """The presets of all families by name, in the order of sweeps."""
  return {preset.name: preset for method in families() for preset in method.presets}


def legend() -> list[str]:
  """The names of all presets in the order of legends and tables."""
  return [
    name
    for method in families()
    for name in (method.legend or [preset.name for preset in method.presets])
  ]


def family_of(preset: str) -> Method:
  """The family that has the preset; KeyError for an unknown one."""
  for method in families():
    if any(one.name == preset for one in method.presets):
      return method
  raise KeyError(preset)


def is_decayed(leaf: str) -> bool:
  """Whether leaves of this name have weight decay: names mean the same in every family."""
  return any(fnmatch.fnmatchcase(leaf, name) for method in families() for name in method.decayed)


def is_mixed(leaf: str) -> bool:
  """Whether routing weights mix the leaves of this name."""
  return any(fnmatch.fnmatchcase(leaf, name) for method in families() for name in method.mixed)
