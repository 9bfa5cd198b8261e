"""One adapted map of every baseline alone, and the scale at which adapters are drawn."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qlora_jax.adapters import config, dense, memory
from tests.adapters import reference, test_references

METHODS = {
  "lora": {},
  "rslora": {},
  "dora": {},
  "lora_xs": {},
  "comol": {},
  "lily": {},
  "comol, top-k": {"top_k": 2},
  "lily, top-k": {"top_k": 2},
}
D_IN, D_OUT, RANK, ATOMS = 6, 7, 3, 5


def build(name):
  """(adapted map, its random variables, x, the network's shared parameters)."""
  method = name.split(",")[0]
  adapter = config.AdapterConfig(family=method, rank=RANK, atoms=ATOMS, alpha=5.0, **METHODS[name])
  module = dense.AdaptedDense(adapter, "up", D_IN, D_OUT)
  rng = np.random.default_rng(5)
  x = rng.normal(size=(4, D_IN)).astype("f")
  shared = {"lily_b_up": rng.normal(size=(ATOMS, RANK, D_OUT)).astype("f")}
  variables = test_references.randomised(module, test_references.Init(module, (x, None, shared)))
  return module, variables, x, shared


@pytest.mark.parametrize("name", METHODS)
def test_one_adapted_map_follows_its_equation(name):
  module, variables, x, shared = build(name)
  actual, routed = module.apply(variables, x, None, shared)
  trees = {key: reference.double(tree) for key, tree in variables.items()}
  block = reference.Block(module.config, {}, reference.double(shared), [], None, None, None)
  expected = reference.adapted_map(
    module.config,
    "up",
    x.astype(float),
    trees["base"],
    trees["params"]["branch"],
    block,
    trees.get("frozen", {}).get("branch"),
  )
  # float32 against float64, sums of at most seven terms of order one.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  assert (routed is None) == (not block.routed)
  if routed is not None:
    weights, logits = block.routed[0]
    np.testing.assert_allclose(routed.weights, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routed.logits, logits, rtol=1e-5, atol=1e-6)


def test_the_frozen_factors_of_lora_xs_are_the_best_low_rank_part_of_the_kernel():
  _, variables, _, _ = build("lora_xs")
  kernel = np.asarray(variables["base"]["kernel"], float)
  lora_a, lora_b = (
    np.asarray(variables["frozen"]["branch"][key], float) for key in ("lora_a", "lora_b")
  )
  left, values, right = np.linalg.svd(kernel)
  best = left[:, :RANK] @ np.diag(values[:RANK]) @ right[:RANK]
  np.testing.assert_allclose(lora_a @ lora_b, best, atol=1e-5)
  np.testing.assert_allclose(lora_b @ lora_b.T, np.eye(RANK), atol=1e-5)
  # The singular values are in A, not shared out between the two.
  np.testing.assert_allclose(lora_a.T @ lora_a, np.diag(values[:RANK] ** 2), atol=1e-5)


def test_the_gradient_of_dora_holds_the_norm_constant():
  module, variables, x, shared = build("dora")
  base, branch = (reference.double(variables[key]) for key in ("base", "params"))
  branch = branch["branch"]
  rng = np.random.default_rng(7)
  direction = rng.normal(size=(4, D_OUT))
  change = {key: rng.normal(size=leaf.shape) for key, leaf in branch.items()}
  start = base["kernel"] + 5 / 3 * branch["lora_a"] @ branch["lora_b"]
  fixed = np.sqrt((start**2).sum(0))

  def value(step):  # of the equation, with the norm of the start
    moved = {key: leaf + step * change[key] for key, leaf in branch.items()}
    updated = base["kernel"] + 5 / 3 * moved["lora_a"] @ moved["lora_b"]
    size = moved["magnitude"] * np.sqrt((base["kernel"] ** 2).sum(0))
    return np.sum(direction * (x @ updated * size / fixed))

  def loss(params):
    return jnp.sum(direction * module.apply({**variables, "params": params}, x, None, shared)[0])

  grads = jax.grad(loss)(variables["params"])["branch"]
  actual = sum(np.sum(np.asarray(grads[key], float) * change[key]) for key in change)
  np.testing.assert_allclose(actual, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-4)


def sample_deviation(values, expected):
  """The root mean square lies within five standard errors of `expected`."""
  return abs(np.sqrt(np.mean(values**2)) / expected - 1) < 5 / np.sqrt(2 * values.size)


def drawn_atoms(kind, noise=0.3):
  """Atoms [40, 12, 12], and cores of CoMoL of the same shape."""
  adapter = config.AdapterConfig(
    rank=12,
    atoms=40,
    query_dim=20,
    atom_init=kind,
    atom_noise=noise,
  )
  shared = memory.SharedParameters(adapter, (("up", 3, "mlp"),))
  params = nn.meta.unbox(shared.init(jax.random.key(0)))["params"]
  comol = config.AdapterConfig(
    family="comol",
    rank=12,
    atoms=40,
    atom_init=kind,
    atom_noise=noise,
  )
  module = dense.AdaptedDense(comol, "up", 12, 12)
  cores = module.init(jax.random.key(1), np.ones((1, 12), "f"), None, {})["params"]
  return params, np.asarray(nn.meta.unbox(cores)["branch"]["cores"], float)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_identity_atoms_deviate_from_the_identity_by_eps(noise):
  params, cores = drawn_atoms("identity", noise)
  for atoms in (np.asarray(params["atoms"], float), cores):
    assert sample_deviation(atoms - np.eye(12), noise)
    assert np.abs(atoms.mean(0) - np.eye(12)).max() < 5 * noise / np.sqrt(40)


def test_orthogonal_atoms_are_orthogonal_and_differ():
  params, cores = drawn_atoms("orthogonal")
  for atoms in (np.asarray(params["atoms"], float), cores):
    products = np.einsum("mrs,mts->mrt", atoms, atoms)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(12), products.shape), atol=1e-5)
    # Between two independent ones, trace(U V^T) / R has deviation 1/R.
    assert np.abs(np.einsum("rs,rs->", atoms[0], atoms[1])) / 12 < 0.5


def test_gaussian_atoms_have_variance_one_over_the_rank():
  params, cores = drawn_atoms("gaussian")
  for atoms in (np.asarray(params["atoms"], float), cores):
    assert sample_deviation(atoms, 12**-0.5)


def test_keys_have_variance_one_and_descriptors_norm_one():
  params, _ = drawn_atoms("identity")
  assert sample_deviation(np.asarray(params["atom_keys"], float), 1.0)
  adapter = config.AdapterConfig(rank=2, atoms=40, prior_weight=1.0, instruction_dim=25)
  shared = memory.SharedParameters(adapter, ()).init(jax.random.key(0))
  descriptors = np.asarray(nn.meta.unbox(shared)["params"]["atom_descriptors"], float)
  assert sample_deviation(descriptors, 25**-0.5)
