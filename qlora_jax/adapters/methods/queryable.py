"""Queryable LoRA (arXiv 2605.08423): one shared memory of atoms, queried once per block.

The branch is the last step, y = x W + scaling (x A) C B; the query and the operator C are the
block's (`router.py`, `summary.py`), their equations are in `functional.py`. Letters as in
`qlora_jax/typing.py`.
"""

from flax import linen as nn

from qlora_jax.adapters import branch, contraction, functional, memory, registry
from qlora_jax.adapters import routing as routing_lib
from qlora_jax.adapters.methods import lora
from qlora_jax.parallel import sharding
from qlora_jax.typing import Array, Float, typed


class Queryable(lora.LoRA):
  """y = x W + scaling (x A) C B, with C the routed operator of the block."""

  @typed
  def low_rank_state(self, x: Float[Array, "*batch D_in"]) -> Float[Array, "*batch R"]:
    """z of this map, step (1), at an input that it does not map."""
    return functional.rms_norm(self.low_rank(x))

  @typed
  def __call__(
    self,
    x: Float[Array, "*batch D_in"],
    base: Float[Array, "*batch D_out"],
    kernel: Float[Array, "D_in D_out"],
    routing: routing_lib.BlockRouting | None,
    shared: memory.Shared,
    low_rank: Float[Array, "*batch R"] | None = None,
  ) -> branch.Corrected:
    del kernel
    product = self.low_rank(x) if low_rank is None else low_rank
    # The anchor's state reuses x A, so that x gets one gradient.
    routed = routing.at(self.map_name, lambda: functional.rms_norm(product))
    atoms = memory.of_map(self.config, shared, self.map_name)["atoms"]
    mixed = contraction.contract(routed, product, atoms, self.config.kept_atoms)
    update = functional.low_rank_output(sharding.tokens(mixed), self.lora_b, self.scaling)
    return base + update, None


def _memory(config, map_outputs) -> list[registry.SharedLeaf]:
  """Atoms and keys, one set per map name with `memory='map'`, and the prior's descriptors."""
  suffixes = [f"_{name}" for name, *_ in map_outputs] if config.memory == "map" else [""]
  leaves = []
  for suffix in suffixes:
    leaves.append(
      registry.SharedLeaf(
        f"atoms{suffix}",
        memory.atom_initializer(config.atom_init, config.atom_noise),
        ("atoms", "rank", "rank_out"),
        (config.atoms, config.rank, config.rank),
      )
    )
    if config.uses_query:
      leaves.append(
        registry.SharedLeaf(
          f"atom_keys{suffix}",
          nn.initializers.normal(1.0),
          ("atoms", "query"),
          (config.atoms, config.query_dim),
        )
      )
  if config.uses_prior:
    width = config.prior_dim or config.instruction_dim
    leaves.append(
      registry.SharedLeaf(
        "atom_descriptors",
        nn.initializers.normal(width**-0.5),
        ("atoms", "prior"),
        (config.atoms, width),
      )
    )
    if config.prior_dim:
      leaves.append(
        registry.SharedLeaf(
          "prior_projection",
          nn.initializers.lecun_normal(),
          ("instruction", "prior"),
          (config.instruction_dim, config.prior_dim),
        )
      )
  return leaves


def _block_parameters(config, maps: int) -> int:
  """The routers of one block, and its gate."""
  routers = maps if config.operator == "map" else 1
  if not config.uses_query:
    return routers * config.atoms
  inputs = config.rank * (config.query_state + (config.summary != "none"))
  inputs += config.instruction_dim * config.instruction_in_query + config.query_bias
  pseudo_queries = routers if config.summary == "attention" else 0
  gates = 1 if config.summary == "recurrent" else 0
  return routers * inputs * config.query_dim + config.rank * (pseudo_queries + gates)


VECTOR_SOFTMAX = 5  # FLOPs per entry: max, subtract, exp, sum, divide


def _routing_flops(config, blocks: int, layers_per_block: int, maps: int) -> float:
  """Steps (2) to (6) of `docs/method.md`."""
  rank, atoms, query_dim = config.rank, config.atoms, config.query_dim
  routers = maps if config.operator == "map" else 1
  sharing = layers_per_block * maps // routers  # maps that share one router
  block = VECTOR_SOFTMAX * min(atoms, config.kept_atoms) + 4.0 * rank  # w, RMSNorm of z
  if config.kept_atoms < atoms:
    block += _selection(atoms, config.kept_atoms)
  if config.uses_query:
    block += 2.0 * query_dim * atoms  # g
    block += 2.0 * query_dim * rank * (config.query_state + (config.summary != "none"))
    block += 2.0 * query_dim * config.instruction_dim * config.instruction_in_query
    if config.summary == "attention":  # powers, scores and the weighted sum over N states
      block += (6.0 * rank + VECTOR_SOFTMAX) * blocks
    elif config.summary == "recurrent":
      block += 3.0 * rank
  order = contraction.choose(config, sharing)
  block += contraction.flops(config, sharing, order)
  block *= routers
  if config.uses_query and config.summary != "none":  # the state left behind
    one_more = contraction.flops(config, sharing + 1, order)
    block += one_more - contraction.flops(config, sharing, order)
  prior = 0.0
  if config.uses_prior:
    width = config.prior_dim or config.instruction_dim
    prior = 2.0 * config.instruction_dim * config.prior_dim + 2.0 * width * atoms
    prior += VECTOR_SOFTMAX * atoms
  return blocks * block + prior


def _selection(atoms: int, kept: int) -> float:
  """Comparisons of the k largest: all pairs for few atoms, else k passes."""
  return 2.0 * atoms**2 if atoms <= 64 else float(kept * atoms)


_VERMILLION, _ORANGE, _PURPLE = "#d55e00", "#e69f00", "#cc79a7"  # Okabe-Ito
_LONG_DASH = (0, (8, 2))

_PRESETS = (
  registry.Preset(
    "queryable",
    "Queryable",
    _VERMILLION,
    "-",
    "*",
    True,
    "a query routes over one shared memory of low-rank atoms",
  ),
  registry.Preset(
    "queryable_topk",
    "Queryable (top-k)",
    _ORANGE,
    "-.",
    ">",
    False,
    "Queryable, keeping only the few atoms with the largest weights",
    {"top_k": 4},
  ),
  registry.Preset(
    "queryable_recurrent",
    "Queryable (recurrent)",
    _ORANGE,
    ":",
    "1",
    False,
    "Queryable, with a recurrent summary of the earlier blocks",
    {"summary": "recurrent"},
  ),
  registry.Preset(
    "queryable_no_summary",
    "Queryable (no summary)",
    _VERMILLION,
    _LONG_DASH,
    "d",
    False,
    "Queryable, without a summary of the earlier blocks in the query",
    {"summary": "none"},
  ),
  registry.Preset(
    "queryable_query",
    "Queryable + query",
    _ORANGE,
    "-",
    "p",
    False,
    "Queryable, with the instruction in the query",
    {"instruction_in_query": True},
  ),
  registry.Preset(
    "queryable_prior",
    "Queryable + prior",
    _VERMILLION,
    "--",
    "h",
    True,
    "Queryable, with the instruction as a prior over the atoms",
    {"prior_weight": 1.0},
  ),
  registry.Preset(
    "queryable_kl",
    "Queryable + KL",
    _VERMILLION,
    "-.",
    "8",
    False,
    "Queryable, with a penalty that pulls the routing towards the instruction's prior",
    {"kl_weight": 0.01},
  ),
  registry.Preset(
    "queryable_prior_query",
    "Queryable + prior + query",
    _ORANGE,
    "--",
    "H",
    False,
    "Queryable, with the instruction in the prior and in the query",
    {"prior_weight": 1.0, "instruction_in_query": True},
  ),
  registry.Preset(
    "static",
    "Static mixture",
    _PURPLE,
    "-",
    "+",
    True,
    "control: the shared atoms in one learned mixture a block, whatever the input",
    {"routing": "static", "summary": "none"},
  ),
  registry.Preset(
    "uniform",
    "Uniform mixture",
    _PURPLE,
    "--",
    "2",
    False,
    "control: the shared atoms with equal weights",
    {"top_k": 4, "weights": "equal"},
  ),
)

METHODS = (
  registry.Method(
    "queryable",
    _PRESETS,
    Queryable,
    lora.map_parameters,
    lora.map_flops,
    learning_rate=1e-3,
    legend=(
      "queryable",
      "queryable_prior",
      "queryable_kl",
      "queryable_query",
      "queryable_prior_query",
      "queryable_topk",
      "queryable_recurrent",
      "queryable_no_summary",
      "static",
      "uniform",
    ),
    router="block",
    shared=_memory,
    block_parameters=_block_parameters,
    routing_flops=_routing_flops,
    certified=True,
    # Not the atoms: they start near the identity or orthogonal, and zero would erase the update.
    mixed=("atoms*",),
  ),
)
