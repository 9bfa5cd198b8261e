"""The decisions of routers: one router's `Routing`, a block's `BlockRouting`, the network's record.

Letters as in `qlora_jax/typing.py`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import struct

from qlora_jax.typing import Array

WHOLE_BLOCK = "block"  # the name of the router that all maps share


@struct.dataclass
class Routing:
  """The decision of one router.

  Attributes:
    weights, logits: [*batch, M].
    operator: C [*batch, R, R] where it is built, else None.
    order: the order of contraction of (x A) C that was chosen for it, see `contraction.py`; '' if
      there is no C.
  """

  weights: Array
  logits: Array
  operator: Array | None = None
  order: str = struct.field(pytree_node=False, default="")


class BlockRouting:
  """The routings of one block, each made once, by the first adapted map that asks for it.

  That map is the anchor: its low-rank state is the z of step (1). With `operator='block'` there is
  one routing, with 'map' one per map name. The object lives inside one trace of one block.

  Attributes:
    state: z [*batch, R] of the block's first anchor, or None before it is reached.
    routings: the `Routing` of each router, in the order in which they were made.
  """

  def __init__(self, routers: Mapping[str, Callable[[Array], Routing]]):
    self._routers = routers
    self.state: Array | None = None
    self.routings: dict[str, Routing] = {}

  def at(self, map_name: str, low_rank_state: Callable[[], Array]) -> Routing:
    """The routing of a map; the first call evaluates `low_rank_state` and routes it."""
    name = map_name if map_name in self._routers else WHOLE_BLOCK
    if name not in self.routings:
      state = low_rank_state()
      self.state = state if self.state is None else self.state
      self.routings[name] = self._routers[name](state)
    return self.routings[name]


class RoutingRecord(NamedTuple):
  """The decisions of every block: weights and logits [N, I, *batch, M], or None without a router.

  I counts the routers of a block: 1 for Queryable LoRA (with `operator='map'` one per map name),
  one per map for Lily and CoMoL. `log_prior` [*batch, M] is the language prior that all blocks
  share, or None.
  """

  weights: Array | None
  logits: Array | None
  log_prior: Array | None = None
