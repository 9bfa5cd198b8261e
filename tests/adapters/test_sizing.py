"""Configs that are refused, the factory, adapters sized to a budget, and the choice of order."""

import dataclasses

import pytest

from qlora_jax import errors
from qlora_jax.adapters import config, contraction, factory, registry, sizing

NETWORK = sizing.Network(
  maps=(("up", 64, 64), ("down", 64, 64)), layers=4, blocks=4, width=64, base_parameters=35_265
)
DECODER = sizing.Network(
  maps=(("q", 96, 96), ("k", 96, 32), ("v", 96, 32), ("up", 96, 256), ("down", 256, 96)),
  layers=6,
  blocks=3,
  width=96,
  base_parameters=10**6,
)
SIZED = [name for name in factory.names() if registry.family_of(name).branch is not None]


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("family", "lorra"),
    ("scaling", "log"),
    ("routing", "hash"),
    ("weights", "hard"),
    ("operator", "layer"),
    ("summary", "mean"),
    ("history", "all"),
    ("atom_init", "zeros"),
    ("contraction", "fast"),
    ("rank", 0),
    ("rank", -3),
    ("atoms", 0),
    ("query_dim", 0),
    ("top_k", 17),
    ("top_k", -1),
    ("prior_temperature", 0.0),
    ("prior_temperature", float("inf")),
    ("alpha", -1.0),
    ("temperature", 0.0),
    ("memory", "layer"),
    ("kl_weight", float("nan")),
    ("load_balance_weight", -0.1),
    ("prior_weight", -1.0),
  ],
)
def test_an_invalid_field_is_one_line_that_names_it(field, value):
  with pytest.raises(errors.UserError) as refused:
    config.AdapterConfig(**{field: value})
  message = str(refused.value)
  assert message.startswith(f"adapter.{field}: {value!r}") and "\n" not in message


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"prior_weight": 1.0}, "instruction_dim"),
    ({"instruction_in_query": True}, "instruction_dim"),
    ({"map_ranks": (("up", 4),)}, "map_ranks"),
    ({"family": "lora", "map_ranks": (("up", 0),)}, "map_ranks[up]"),
    ({"query_state": False, "query_bias": False, "summary": "none"}, "query_state"),
    ({"memory": "map"}, "memory"),
  ],
)
def test_fields_that_contradict_each_other_are_refused(fields, named):
  with pytest.raises(errors.UserError) as refused:
    config.AdapterConfig(**fields)
  assert str(refused.value).startswith(f"adapter.{named}:")


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"rank": 4}, 1.0),
    ({"rank": 4, "alpha": 8.0}, 2.0),
    ({"rank": 4, "alpha": 8.0, "scaling": "sqrt_rank"}, 4.0),
    ({"rank": 4, "alpha": 8.0, "family": "rslora"}, 4.0),
    ({"rank": 4, "alpha": 8.0, "family": "lora", "map_ranks": (("up", 8),)}, 1.0),
  ],
)
def test_scaling_is_alpha_over_rank_or_its_root(fields, expected):
  assert config.AdapterConfig(**fields).scale_of("up") == expected


@pytest.mark.parametrize("network", [NETWORK, DECODER])
@pytest.mark.parametrize("name", SIZED)
def test_every_method_is_sized_within_two_percent(name, network):
  budget = 8192 if network is NETWORK else 40_000
  if name == "lora_xs" and network is DECODER:
    budget = 20_000  # its cores are no wider than the narrowest map
  adapter = factory.make(name, {}, network, budget=budget, instruction_dim=16)
  assert abs(sizing.count(adapter, network) / budget - 1) <= sizing.TOLERANCE


@pytest.mark.parametrize("name", ["lora", "queryable", "lora_xs"])
def test_a_budget_that_nothing_meets_says_what_is_nearest(name):
  with pytest.raises(errors.UserError, match=r"adapter\.budget: no .* has 3 trainable"):
    factory.make(name, {}, NETWORK, budget=3, instruction_dim=0)


def test_a_given_rank_is_kept_and_a_given_number_of_atoms_too():
  adapter = factory.make("queryable", {"rank": 5}, NETWORK, budget=8192, instruction_dim=0)
  assert adapter.rank == 5 and adapter.atoms == config.AdapterConfig().atoms
  adapter = factory.make("queryable", {"atoms": 12}, NETWORK, budget=8400, instruction_dim=0)
  assert adapter.atoms == 12


@pytest.mark.parametrize(("name", "rank"), [("queryable", 6), ("static", 7), ("comol", 5)])
def test_zero_atoms_beside_a_rank_fill_the_budget(name, rank):
  fields = {"rank": rank, "atoms": 0}
  filled = factory.make(name, fields, NETWORK, budget=8192, instruction_dim=0)
  assert filled.rank == rank
  off = [
    abs(sizing.count(dataclasses.replace(filled, atoms=filled.atoms + more), NETWORK) - 8192)
    for more in (0, -1, 1)
  ]
  assert off[0] == min(off) and off[0] <= sizing.TOLERANCE * 8192


@pytest.mark.parametrize(
  ("name", "rank", "said"), [("queryable", 16, "the nearest has"), ("lora", 8, "has no atoms")]
)
def test_atoms_that_cannot_fill_the_budget_are_refused(name, rank, said):
  with pytest.raises(errors.UserError, match=rf"adapter\.atoms: .*{said}"):
    factory.make(name, {"rank": rank, "atoms": 0}, NETWORK, budget=8192, instruction_dim=0)


def test_the_instruction_is_dropped_where_nothing_reads_it():
  assert factory.make("lora", {}, NETWORK, budget=8192, instruction_dim=16).instruction_dim == 0
  sized = factory.make("queryable_prior", {}, NETWORK, budget=8192, instruction_dim=16)
  assert sized.instruction_dim == 16


def test_an_unknown_adapter_lists_the_known_ones():
  with pytest.raises(errors.UserError, match=r"adapter\.name: 'nope' .* queryable"):
    factory.make("nope", {}, NETWORK, budget=1, instruction_dim=0)


def test_the_chosen_order_of_contraction_is_the_cheapest_or_the_users():
  wide = config.AdapterConfig(rank=16, atoms=16)
  assert contraction.choose(wide, 7) == "operator"
  many = dataclasses.replace(wide, atoms=4096, top_k=2)
  assert contraction.choose(many, 7) == "gather"
  assert contraction.choose(dataclasses.replace(wide, contraction="product"), 7) == "product"
