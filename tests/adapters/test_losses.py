"""The penalties on the routing and its statistics against NumPy loops."""

import dataclasses

import jax
import numpy as np
import pytest

from qlora_jax.adapters import config, losses, routing, statistics

BLOCKS, ROUTERS, ROWS, TOKENS, ATOMS = 2, 3, 4, 5, 6
RNG = np.random.default_rng(1)
LOGITS = RNG.normal(size=(BLOCKS, ROUTERS, ROWS, TOKENS, ATOMS)).astype("f")
KEPT = np.median(LOGITS, axis=-1, keepdims=True) <= LOGITS
WEIGHTS = np.asarray(jax.nn.softmax(np.where(KEPT, LOGITS, -np.inf)))
LOG_PRIOR = np.asarray(jax.nn.log_softmax(RNG.normal(size=(ROWS, TOKENS, ATOMS)).astype("f")))
MASK = (RNG.uniform(size=(ROWS, TOKENS)) > 0.4).astype("f")
CLOSE = {"rtol": 1e-5}  # float32 sums of a few hundred terms of order one


def cells(mask):
  for b, g, row, token in np.ndindex(BLOCKS, ROUTERS, ROWS, TOKENS):
    if mask is None or mask[row, token]:
      yield b, g, row, token


@pytest.mark.parametrize("mask", [None, MASK])
def test_kl_to_the_prior_is_the_mean_of_the_tokens_own(mask):
  terms = []
  for b, g, row, token in cells(mask):
    w = WEIGHTS[b, g, row, token].astype(np.float64)
    prior = LOG_PRIOR[row, token]
    terms.append(sum(w[m] * (np.log(w[m]) - prior[m]) for m in range(ATOMS) if w[m] > 0))
  np.testing.assert_allclose(losses.kl_to_prior(WEIGHTS, LOG_PRIOR, mask), np.mean(terms), **CLOSE)


def test_kl_has_a_finite_gradient_where_weights_are_zero():
  gradient = jax.grad(lambda w: losses.kl_to_prior(w, LOG_PRIOR))(WEIGHTS)
  assert (WEIGHTS == 0).any() and np.isfinite(gradient).all()


@pytest.mark.parametrize("mask", [None, MASK])
def test_load_balance_multiplies_hard_share_and_soft_mean(mask):
  values = []
  for b, g in np.ndindex(BLOCKS, ROUTERS):
    share, mean, count = np.zeros(ATOMS), np.zeros(ATOMS), 0
    for bb, gg, row, token in cells(mask):
      if (bb, gg) == (b, g):
        count += 1
        share[np.argmax(WEIGHTS[b, g, row, token])] += 1
        exp = np.exp(LOGITS[b, g, row, token].astype(np.float64))
        mean += exp / exp.sum()
    values.append(ATOMS * np.sum(share / count * mean / count))
  np.testing.assert_allclose(losses.load_balance(WEIGHTS, LOGITS, mask), np.mean(values), **CLOSE)


def test_load_balance_is_one_when_balanced_and_m_when_collapsed():
  even = np.eye(ATOMS, dtype="f")[None, None]
  np.testing.assert_allclose(losses.load_balance(even, np.zeros_like(even)), 1.0, rtol=1e-6)
  one = np.zeros((1, 1, 8, ATOMS), "f")
  one[..., 0] = 1.0
  np.testing.assert_allclose(losses.load_balance(one, 1e3 * one), ATOMS, rtol=1e-6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_z_loss_is_the_mean_squared_logsumexp(mask):
  terms = [np.log(np.sum(np.exp(LOGITS[cell].astype(np.float64)))) ** 2 for cell in cells(mask)]
  np.testing.assert_allclose(losses.z_loss(LOGITS, mask), np.mean(terms), **CLOSE)


def test_the_penalty_adds_what_the_config_switches_on():
  record = routing.RoutingRecord(WEIGHTS, LOGITS, LOG_PRIOR)
  base = config.AdapterConfig(instruction_dim=3)
  assert losses.penalty(base, record) == 0.0
  for field, value in (
    ("kl_weight", losses.kl_to_prior(WEIGHTS, LOG_PRIOR, MASK)),
    ("load_balance_weight", losses.load_balance(WEIGHTS, LOGITS, MASK)),
    ("z_loss_weight", losses.z_loss(LOGITS, MASK)),
  ):
    adapter = dataclasses.replace(base, **{field: 0.3})
    np.testing.assert_allclose(losses.penalty(adapter, record, MASK), 0.3 * value, rtol=1e-6)
  assert losses.penalty(base, routing.RoutingRecord(None, None)) == 0.0


@pytest.mark.parametrize("mask", [None, MASK])
def test_routing_statistics_are_means_over_the_masked_tokens(mask):
  result = statistics.routing_statistics(WEIGHTS, mask)
  support, entropy, share, count = [], [], np.zeros((BLOCKS, ATOMS)), 0
  for cell in cells(mask):
    w = WEIGHTS[cell].astype(np.float64)
    support.append(1 / np.sum(w**2))
    entropy.append(-sum(x * np.log(x) for x in w if x > 0))
    share[cell[0]] += w
    count += 1
  share /= count / BLOCKS
  np.testing.assert_allclose(result["effective_support"], np.mean(support), **CLOSE)
  np.testing.assert_allclose(result["entropy"], np.mean(entropy), **CLOSE)
  np.testing.assert_allclose(result["share"], share, **CLOSE)
  np.testing.assert_allclose(result["max_share"], share.mean(0).max(), **CLOSE)


def test_effective_support_is_one_when_collapsed_and_m_when_uniform():
  collapsed = np.zeros((1, 1, 3, ATOMS), "f")
  collapsed[..., 2] = 1.0
  assert statistics.routing_statistics(collapsed)["effective_support"] == 1.0
  uniform = np.full((1, 1, 3, ATOMS), 1 / ATOMS, "f")
  result = statistics.routing_statistics(uniform)
  np.testing.assert_allclose(result["effective_support"], ATOMS, rtol=1e-6)
  np.testing.assert_allclose(result["entropy"], np.log(ATOMS), rtol=1e-6)


def test_share_by_group_averages_each_group_alone():
  weights, group = WEIGHTS[:, :, :, 0], np.array([0, 2, 0, 2])
  result = statistics.share_by_group(weights, group, 3)
  for index in range(3):
    members = weights[:, :, group == index]
    expected = members.mean((1, 2)) if members.size else np.zeros((BLOCKS, ATOMS))
    np.testing.assert_allclose(result[index], expected, **CLOSE)


@pytest.mark.parametrize("routed", [False, True])
def test_update_norms_equal_the_dense_matrices(routed):
  maps, rank, width = ("up", "down"), 3, 7
  adapter = config.AdapterConfig(family="queryable" if routed else "lora", rank=rank, alpha=6.0)
  layer = {
    name: {
      "branch": {
        "lora_a": RNG.normal(size=(BLOCKS, width, rank)).astype("f"),
        "lora_b": RNG.normal(size=(BLOCKS, rank, width)).astype("f"),
      }
    }
    for name in maps
  }
  atoms = RNG.normal(size=(ATOMS, rank, rank)).astype("f")
  params = {"stack": {"blocks": {"layer_0": layer}, "memory": {"atoms": atoms}}}
  if not routed:
    del params["stack"]["memory"]
  weights = WEIGHTS[:, :1]
  result = statistics.update_norms(adapter, params, weights if routed else None)
  largest, bound = 0.0, 0.0
  top = max(np.linalg.norm(atom, 2) for atom in atoms) if routed else 1.0
  for name in maps:
    for b in range(BLOCKS):
      lora_a, lora_b = (layer[name]["branch"][key][b] for key in ("lora_a", "lora_b"))
      bound = max(bound, 2 * np.linalg.norm(lora_a, 2) * np.linalg.norm(lora_b, 2) * top)
      for w in weights[b, 0].reshape(-1, ATOMS) if routed else [None]:
        core = np.einsum("m,mrs->rs", w, atoms) if routed else np.eye(rank)
        largest = max(largest, 2 * np.linalg.norm(lora_a @ core @ lora_b, 2))
  np.testing.assert_allclose(result["certified"], bound, rtol=1e-4)
  np.testing.assert_allclose(result["measured"], largest, rtol=1e-4)
  assert result["slack"] >= 0
  if routed:  # the forward pass overflowed
    diverged = statistics.update_norms(adapter, params, np.full_like(weights, np.nan))
    assert np.isnan(list(diverged.values())).all()
  lora_a = layer["up"]["branch"]["lora_a"]
  lora_a[0, 0, 0] = 3e38  # finite itself, but not its product with B
  with np.errstate(over="ignore", invalid="ignore"):
    overflowed = statistics.update_norms(adapter, params, weights if routed else None)
  assert not np.isfinite(overflowed["slack"])
  lora_a[0, 0, 0] = np.nan
  diverged = statistics.update_norms(adapter, params, weights if routed else None)
  assert np.isnan(list(diverged.values())).all()
