"""The settings of an adapter: one frozen, validated record that every module reads.

`family` names the family, whose record is `record`. Only families that route read the fields below
`# routing`. The controls of the study are settings of these fields, not families.
"""

import dataclasses
import math

from qlora_jax import errors
from qlora_jax.adapters import registry

CHOICES = {
  "scaling": ("rank", "sqrt_rank"),
  "routing": ("query", "static"),
  "weights": ("softmax", "equal"),
  "operator": ("block", "map"),
  "memory": ("network", "map"),
  "summary": ("attention", "recurrent", "none"),
  "history": ("routed", "output"),
  "atom_init": ("identity", "orthogonal", "gaussian"),
  "contraction": ("auto", "operator", "product", "gather"),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Settings of the one adapter slot. Hashable, so that a compiled step can be keyed by it.

  Attributes:
    family: the name of a `registry.Method`.
    rank: R, the width of the bottleneck of every adapted map.
    map_ranks: (map name, rank) pairs that override `rank`; only for families that share nothing.
    alpha: the numerator of the scaling; 0 means alpha = rank (scaling 1 with `scaling='rank'`).
    scaling: 'rank' for alpha/R, 'sqrt_rank' for alpha/sqrt(R).
    atoms: M, atoms of the memory (cores per map for comol, experts for lily).
    top_k: k, atoms kept per token; 0 keeps all (dense routing).
    query_dim: Q, width of query and keys.
    routing: 'query', or 'static': one learned mixture per block, no query.
    weights: 'softmax', or 'equal': 1/k on the top k, gradient straight through.
    operator: which maps share one routed operator: all of a 'block', or those of one name, 'map',
      with one router and one anchor per name.
    memory: which maps share one memory of atoms and keys: all of the 'network', or those of one
      name, 'map' (needs `operator='map'`; all names share the prior's descriptors).
    temperature: of the softmax over atoms: the logits of step (4) are divided by it (ours).
    summary: the running summary, see `summary.py`.
    history: h, the state that a block leaves to the summary: the 'routed' z C, or that of the
      block's 'output'.
    query_state: whether z enters the query.
    query_bias: whether a learned bias per block enters the query.
    instruction_dim: E, width of the instruction embedding; 0 when there is none.
    instruction_in_input: whether e is added to the backbone's input through a trained map.
    instruction_in_query: whether e enters the query through W_e.
    prior_weight: lambda, weight of log pi(e) in the logits; 0 switches it off.
    prior_temperature: tau of the prior.
    prior_dim: P, width of the descriptors; 0 means P = E without a projection.
    kl_weight: weight of the penalty KL(w || pi); 0 switches it off.
    load_balance_weight: weight of the load-balance loss.
    z_loss_weight: weight of the router z-loss.
    atom_init: 'identity' I + eps G, 'orthogonal', or 'gaussian' (variance 1/R).
    atom_noise: eps of the identity initialiser.
    contraction: order of contraction of x A C, see `contraction.py`.
  """

  family: str = "queryable"
  rank: int = 8
  map_ranks: tuple[tuple[str, int], ...] = ()
  alpha: float = 0.0
  scaling: str = "rank"
  # routing
  atoms: int = 16
  top_k: int = 0
  query_dim: int = 8
  routing: str = "query"
  weights: str = "softmax"
  operator: str = "block"
  memory: str = "network"
  temperature: float = 1.0
  summary: str = "attention"
  history: str = "routed"
  query_state: bool = True
  query_bias: bool = True
  instruction_dim: int = 0
  instruction_in_input: bool = False
  instruction_in_query: bool = False
  prior_weight: float = 0.0
  prior_temperature: float = 1.0
  prior_dim: int = 0
  kl_weight: float = 0.0
  load_balance_weight: float = 0.0
  z_loss_weight: float = 0.0
  atom_init: str = "identity"
  atom_noise: float = 0.1
  contraction: str = "auto"

  def __post_init__(self):
    names = [method.name for method in registry.families()]
    if self.family not in names:
      _fail("family", self.family, "one of " + ", ".join(names))
    for field, choices in CHOICES.items():
      if getattr(self, field) not in choices:
        _fail(field, getattr(self, field), "one of " + ", ".join(choices))
    for field in ("rank", "atoms", "query_dim"):
      if getattr(self, field) < 1:
        _fail(field, getattr(self, field), "an integer of at least 1")
    for name, rank in self.map_ranks:
      if rank < 1:
        _fail(f"map_ranks[{name}]", rank, "an integer of at least 1")
    if not 0 <= self.top_k <= self.atoms:
      _fail("top_k", self.top_k, f"0 (dense) or 1 to atoms = {self.atoms}")
    for field in ("temperature", "prior_temperature"):
      if not 0 < getattr(self, field) < math.inf:
        _fail(field, getattr(self, field), "a finite number above 0")
    if self.memory == "map" and self.operator != "map":
      _fail("memory", self.memory, "'network' unless adapter.operator is 'map'")
    for field in (
      "alpha",
      "atom_noise",
      "kl_weight",
      "load_balance_weight",
      "z_loss_weight",
      "prior_weight",
      "prior_dim",
      "instruction_dim",
    ):
      if not 0 <= getattr(self, field) < math.inf:
        _fail(field, getattr(self, field), "a finite number of at least 0")
    if self.uses_instruction and not self.instruction_dim:
      _fail("instruction_dim", 0, "above 0 when an instruction is used")
    if self.map_ranks and self.record.shared:
      _fail("map_ranks", self.map_ranks, f"empty for {self.family}, whose maps share one core")
    if self.uses_query:
      query_inputs = (self.query_state, self.query_bias, self.instruction_in_query)
      if not any(query_inputs) and self.summary == "none":
        _fail("query_state", False, "True: a query with no input cannot route")

  @property
  def record(self) -> registry.Method:
    """The record of the family."""
    return registry.get(self.family)

  @property
  def trains_base(self) -> bool:
    """Whether the base's own weights are trained: full fine-tuning."""
    return self.record.trains_base

  @property
  def routed(self) -> bool:
    """Whether the blocks share one memory and have one routed operator each."""
    return self.record.router == "block"

  @property
  def has_router(self) -> bool:
    """Whether there are routing weights, of blocks or of maps."""
    return bool(self.record.router)

  @property
  def uses_prior(self) -> bool:
    return self.routed and (self.prior_weight > 0 or self.kl_weight > 0)

  @property
  def uses_instruction(self) -> bool:
    in_query = self.uses_query and self.instruction_in_query
    return self.uses_prior or in_query or self.instruction_in_input

  @property
  def uses_query(self) -> bool:
    return self.routed and self.routing == "query"

  @property
  def kept_atoms(self) -> int:
    """k: the number of atoms with weight."""
    return self.top_k or self.atoms

  def rank_of(self, map_name: str) -> int:
    return dict(self.map_ranks).get(map_name, self.rank)

  def scale_of(self, map_name: str) -> float:
    """alpha/R, or alpha/sqrt(R) with the scaling 'sqrt_rank' of the config or of the family."""
    rank = self.rank_of(map_name)
    alpha = self.alpha or float(rank)
    root = "sqrt_rank" in (self.scaling, self.record.scaling)
    return alpha / math.sqrt(rank) if root else alpha / rank


def _fail(field: str, value, expected: str):
  raise errors.UserError(f"adapter.{field}: {value!r} is not valid; use {expected}")
