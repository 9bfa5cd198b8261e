"""One-line faults of the adapters, the optimizer and the routing gain; see `planted_faults.py`."""

import dataclasses

REFERENCES = "tests/adapters/test_references.py"
BRANCHES = "tests/adapters/test_branches.py"
PEFT = "tests/adapters/test_peft_parity.py"
FUNCTIONAL = "tests/adapters/test_functional.py"
LOSSES = "tests/adapters/test_losses.py"
REROUTING = "tests/adapters/test_rerouting.py"
OPTIMIZER = "tests/training/test_optimizer.py"
GAIN = "tests/workloads/test_routing_gain.py"


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault.

  Attributes:
    name: says what is wrong with it planted.
    path: the file, which has `old` once.
    old, new: the text and what takes its place.
    tests: what ought to fail.
  """

  name: str
  path: str
  old: str
  new: str
  tests: tuple[str, ...]


_A, _D, _T = "qlora_jax/adapters/", "qlora_jax/data/text/", "qlora_jax/training/"
_S, _W, _E = "qlora_jax/studies/statistics.py", "qlora_jax/weights/", "qlora_jax/workloads/"

FAULTS = (
  # The baselines and the method.
  Fault(
    "the history keeps z, not z C",
    _A + "block.py",
    "return contraction.contract(routed, routing.state, atoms, cfg.kept_atoms)",
    "return routing.state",
    (REFERENCES,),
  ),
  Fault(
    "epsilon squared in the identity atoms",
    _A + "memory.py",
    "+ noise * jax.random.normal",
    "+ noise**2 * jax.random.normal",
    (BRANCHES, REFERENCES),
  ),
  Fault(
    "a static mixture ignores the prior",
    _A + "router.py",
    "if log_prior is not None and cfg.prior_weight:",
    "if False:",
    (REFERENCES,),
  ),
  Fault(
    "CoMoL's router without its norm",
    _A + "methods/comol.py",
    "self.route(functional.rms_norm(low_rank), router_kernel, cores)",
    "self.route(low_rank, router_kernel, cores)",
    (BRANCHES, REFERENCES),
  ),
  Fault(
    "Lily without scaling",
    _A + "methods/lily.py",
    'update = self.scaling * jnp.einsum("...mr,mrd->...d", spread, experts)',
    'update = jnp.einsum("...mr,mrd->...d", spread, experts)',
    (BRANCHES, REFERENCES, PEFT),
  ),
  Fault(
    "Lily's experts averaged",
    _A + "methods/lily.py",
    '"...m,...r->...mr", routed.weights, low_rank)',
    '"...m,...r->...mr", jnp.ones_like(routed.weights) / routed.weights.shape[-1], low_rank)',
    (BRANCHES, REFERENCES, PEFT),
  ),
  Fault(
    "DoRA's norm takes a gradient",
    _A + "methods/dora.py",
    "norm = jax.lax.stop_gradient(jnp.linalg.norm(updated, axis=0))",
    "norm = jnp.linalg.norm(updated, axis=0)",
    (BRANCHES, PEFT),
  ),
  Fault(
    "DoRA's magnitude on the update alone",
    _A + "methods/dora.py",
    "return ratio * (base + functional.low_rank_output(low_rank, lora_b, self.scaling)), None",
    "return base + ratio * functional.low_rank_output(low_rank, lora_b, self.scaling), None",
    (BRANCHES, REFERENCES, PEFT),
  ),
  Fault(
    "LoRA-XS without singular values",
    _A + "methods/lora_xs.py",
    "left[:, :rank] * values[:rank]",
    "left[:, :rank]",
    (BRANCHES, REFERENCES),
  ),
  Fault(
    "rsLoRA scaled as LoRA",
    _A + "config.py",
    'root = "sqrt_rank" in (self.scaling, self.record.scaling)',
    'root = self.scaling == "sqrt_rank"',
    (BRANCHES, REFERENCES, PEFT),
  ),
  Fault(
    "LoRA's scaling is alpha",
    _A + "config.py",
    "return alpha / math.sqrt(rank) if root else alpha / rank",
    "return alpha / math.sqrt(rank) if root else alpha",
    (BRANCHES, REFERENCES, PEFT),
  ),
  Fault(
    "the query reads the state where it should read the summary",
    _A + "functional.py",
    'jnp.einsum("...r,rq->...q", summary, summary_kernel)',
    'jnp.einsum("...r,rq->...q", state, summary_kernel)',
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "logits not divided by the root of Q",
    _A + "functional.py",
    " / jnp.sqrt(1.0 * atom_keys.shape[-1])",
    "",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "the prior ignores its temperature",
    _A + "functional.py",
    "jax.nn.log_softmax(scores / temperature, axis=-1)",
    "jax.nn.log_softmax(scores, axis=-1)",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "lambda squared",
    _A + "functional.py",
    "logits = logits + prior_weight * log_prior",
    "logits = logits + prior_weight**2 * log_prior",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "the logits are multiplied by the temperature",
    _A + "router.py",
    "logits = logits / cfg.temperature",
    "logits = logits * cfg.temperature",
    (REFERENCES,),
  ),
  Fault(
    "depth attention sees the block itself",
    _A + "summary.py",
    "(jnp.arange(len(history)) < index)",
    "(jnp.arange(len(history)) <= index)",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "depth attention scores states without their norm",
    _A + "summary.py",
    "  scores = scores * jax.lax.rsqrt(power + functional.RMS_EPSILON)\n  # A finite floor",
    "  # A finite floor",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "the recurrent gate the wrong way round",
    _A + "summary.py",
    "return keep * summary + (1.0 - keep) * state",
    "return keep * state + (1.0 - keep) * summary",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "one atom too many passes the top k",
    _A + "functional.py",
    "(jnp.sum(beats, axis=-1) < k)",
    "(jnp.sum(beats, axis=-1) <= k)",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "equal weights give the router no gradient",
    _A + "functional.py",
    "return weights + jax.lax.stop_gradient("
    "mask / jnp.sum(mask, axis=-1, keepdims=True) - weights)",
    "return jax.lax.stop_gradient(mask / jnp.sum(mask, axis=-1, keepdims=True))",
    (FUNCTIONAL,),
  ),
  Fault(
    "the operator is applied transposed",
    _A + "functional.py",
    "  return ((low_rank @ repeat) * flat) @ collect",
    "  flat = jnp.swapaxes(operator, -1, -2).reshape(flat.shape)\n"
    "  return ((low_rank @ repeat) * flat) @ collect",
    (FUNCTIONAL, REFERENCES),
  ),
  Fault(
    "the KL penalty adds the prior",
    _A + "losses.py",
    "(jnp.log(positive) - log_prior)",
    "(jnp.log(positive) + log_prior)",
    (LOSSES,),
  ),
  Fault(
    "the load balance is not scaled by M",
    _A + "losses.py",
    "jnp.mean(num_atoms * jnp.sum(share * mean, axis=-1))",
    "jnp.mean(jnp.sum(share * mean, axis=-1))",
    (LOSSES,),
  ),
  # The optimizer.
  Fault(
    "weight decay pulls on the atoms",
    _T + "optimizer.py",
    "optax.add_decayed_weights(config.weight_decay, mask=decayed)",
    "optax.add_decayed_weights(config.weight_decay)",
    (OPTIMIZER,),
  ),
  Fault(
    "no clipping of the gradient",
    _T + "optimizer.py",
    "parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []",
    "parts = []",
    (OPTIMIZER, "tests/training/test_frozen_groups.py", PEFT),
  ),
  # What the routing gains.
  Fault(
    "a row keeps its own weights in the exchange",
    _E + "routing_gain.py",
    "other[order] = np.roll(order, 1)",
    "other[order] = order",
    (GAIN,),
  ),
  Fault(
    "uniform weights are the mean weights",
    _E + "routing_gain.py",
    "uniform = jnp.full_like(mean, 1 / mean.shape[-1])",
    "uniform = mean",
    (GAIN,),
  ),
  Fault(
    "replaced weights always reach the first router",
    _A + "rerouting.py",
    'position["router"] += 1',
    'position["router"] += 0',
    (REROUTING + "::test_the_trained_weights_put_back_change_nothing",),
  ),
)
