"""LoRA, rsLoRA, DoRA and Lily against PEFT's own layers: outputs, gradients and ten AdamW steps.

One residual MLP on both sides, with the same base, factors and batch. Ours runs in float32, PEFT's
in float64. What cannot be equal is in `docs/method.md`, and each test says how it avoids it.
"""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from qlora_jax.adapters import config
from qlora_jax.models import mlp
from qlora_jax.training import optimizer, step
from tests.adapters import reference, test_references

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

RANK, ALPHA, EXPERTS = 3, 5, 4
SHAPE = mlp.MLPConfig(inputs=5, width=8, hidden=10, layers=2, layers_per_block=1)
ADAPTERS = {
  name: config.AdapterConfig(family=name, rank=RANK, alpha=float(ALPHA), atoms=EXPERTS)
  for name in ("lora", "rslora", "dora", "lily")
}
OPTIMIZER = optimizer.OptimizerConfig(
  steps=10, warmup=0.2, b1=0.8, b2=0.95, weight_decay=0.1, clip=1.0
)
LEARNING_RATE = 0.03


class TorchMLP(torch.nn.Module):
  """`mlp.MLP` without an adapter."""

  def __init__(self):
    super().__init__()
    self.input = torch.nn.Linear(SHAPE.inputs, SHAPE.width)
    self.layers = torch.nn.ModuleList(
      torch.nn.ModuleDict(
        {
          "norm": torch.nn.RMSNorm(SHAPE.width, eps=1e-6),
          "up": torch.nn.Linear(SHAPE.width, SHAPE.hidden),
          "down": torch.nn.Linear(SHAPE.hidden, SHAPE.width),
        }
      )
      for _ in range(SHAPE.layers)
    )
    self.norm = torch.nn.RMSNorm(SHAPE.width, eps=1e-6)
    self.output = torch.nn.Linear(SHAPE.width, 1)

  def forward(self, x):
    hidden = self.input(x)
    for layer in self.layers:
      inner = torch.nn.functional.gelu(layer["up"](layer["norm"](hidden)), approximate="tanh")
      hidden = hidden + layer["down"](inner)
    return self.output(self.norm(hidden))[..., 0]


def theirs(name, base):
  """PEFT's adapter on the same base, in float64."""
  model = TorchMLP()
  blocks = base["stack"]["blocks"]["layer_0"]
  values = {}
  for place in ("input", "output"):
    values[f"{place}.weight"], values[f"{place}.bias"] = (
      base[place]["kernel"].T,
      base[place]["bias"],
    )
  values["norm.weight"] = base["norm"]["scale"]
  for index in range(SHAPE.layers):
    values[f"layers.{index}.norm.weight"] = blocks["norm"]["scale"][index]
    for place in mlp.MAPS:
      values[f"layers.{index}.{place}.weight"] = blocks[place]["kernel"][index].T
      values[f"layers.{index}.{place}.bias"] = blocks[place]["bias"][index]
  model.load_state_dict({key: torch.tensor(value) for key, value in values.items()})
  targets = {"target_modules": list(mlp.MAPS), "r": RANK}
  if name == "lily":  # stride_A = 1: one A per layer, as ours
    settings = peft.LilyConfig(**targets, stride_A=1, num_B=EXPERTS, scaling=ALPHA / RANK)
  else:
    settings = peft.LoraConfig(
      **targets, lora_alpha=ALPHA, use_rslora=name == "rslora", use_dora=name == "dora"
    )
  return peft.get_peft_model(model, settings).double()


def trained(model, name, read, write=None):
  """PEFT's trained tensors as a tree of ours: `read(parameter)` in our layout.

  With `write`, a tree of ours, the parameters are set from it instead. DoRA's magnitude is absolute
  in PEFT and relative to ||W||_c here: `read` gets the factor from theirs to ours.
  """
  layers = model.base_model.model.layers
  tree = {place: {} for place in mlp.MAPS}
  memory = {}

  def visit(parameter, layout, inverse, source, unit=1.0):
    if source is not None:
      value = inverse(np.asarray(source, np.float64)) / unit
      parameter.data.copy_(torch.tensor(value))
    return layout(read(parameter, unit))

  def transpose(value):
    return value.T

  for place in mlp.MAPS:
    branch = None if write is None else write["stack"]["blocks"]["layer_0"][place]["branch"]

    def leaf(key, index, parameter, branch=branch, unit=1.0, layout=transpose):
      source = None if branch is None else branch[key][index]
      return visit(parameter, layout, layout, source, unit)

    rows = []
    for index in range(SHAPE.layers):
      module = layers[index][place]
      if name == "lily":
        rows.append(
          {
            "lora_a": leaf("lora_a", index, module.lily_A["default"].weight),
            "router": leaf("router", index, module.lily_router["default"].weight),
          }
        )
        source = None if write is None else write["stack"]["memory"][f"lily_b_{place}"]
        memory[f"lily_b_{place}"] = visit(
          module.lily_B["default"].weight,
          lambda value: value.reshape(EXPERTS, RANK, -1),
          lambda value: value.reshape(EXPERTS * RANK, -1),
          source,
        )
        continue
      row = {
        "lora_a": leaf("lora_a", index, module.lora_A["default"].weight),
        "lora_b": leaf("lora_b", index, module.lora_B["default"].weight),
      }
      if name == "dora":
        norm = torch.linalg.norm(module.get_base_layer().weight, dim=1).numpy()
        row["magnitude"] = leaf(
          "magnitude", index, module.lora_magnitude_vector["default"].weight, unit=1 / norm
        )
      rows.append(row)
    tree[place]["branch"] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  stack = {"blocks": {"layer_0": tree}}
  return {"stack": {**stack, "memory": memory} if memory else stack}


@functools.partial(jax.jit, static_argnums=3)
def evaluate(params, frozen, batch, model):
  """(Predictions, mean squared error, gradients): one program per adapter for all tests."""
  values = model.apply(step.variables(model, params, frozen), batch.features).values
  return values, *step.gradients(params, frozen, batch, model)


def value_of(parameter, unit):
  return parameter.detach().numpy() * unit


def gradient_of(parameter, unit):
  return parameter.grad.numpy() / unit


def predict(model, name, features):
  if name != "lily":
    return model(features)
  # PEFT averages the router's weights over all tokens of a call: one call per token.
  return torch.cat([model(row) for row in features.split(1)])


def make_pair(name, unit_columns=False):
  """(our model, params, frozen, batch, PEFT's model)."""
  model = mlp.MLP(SHAPE, ADAPTERS[name])
  rng = np.random.default_rng(3)
  batch = step.Batch(
    rng.normal(size=(6, 5)).astype("f"), 20 * rng.normal(size=6).astype("f"), np.zeros((6, 1), "f")
  )
  init = test_references.Init(model, (batch.features, None))
  variables = test_references.random_tree(
    nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))), seed=4
  )
  base, params = variables["base"], variables["params"]
  if unit_columns:
    for place in mlp.MAPS:
      leaves = base["stack"]["blocks"]["layer_0"][place]
      leaves["kernel"] = leaves["kernel"] / np.linalg.norm(leaves["kernel"], axis=1, keepdims=True)
  other = theirs(name, base)
  trained(other, name, value_of, write=params)
  return model, params, step.Frozen(base, {}), batch, other


def agree(ours, others, tolerance):
  """Every leaf within `tolerance` of its largest entry."""
  assert jax.tree.structure(ours) == jax.tree.structure(others)
  for (path, leaf), other in zip(
    jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(others), strict=True
  ):
    error = np.abs(np.asarray(leaf, np.float64) - other).max() / np.abs(other).max()
    assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.mark.parametrize("name", ADAPTERS)
def test_outputs_and_gradients_are_those_of_peft(name):
  model, params, frozen, batch, other = make_pair(name)
  prediction = predict(other, name, torch.tensor(batch.features, dtype=torch.float64))
  loss = torch.mean((prediction - torch.tensor(batch.targets)) ** 2)
  loss.backward()
  values, error, grads = evaluate(params, frozen, batch, model)
  counted = sum(p.numel() for p in other.parameters() if p.requires_grad)
  assert counted == sum(leaf.size for leaf in jax.tree.leaves(params))
  # float32 against float64: 1e-6 is usual, ten times that is allowed.
  np.testing.assert_allclose(values, prediction.detach().numpy(), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(error, loss.item(), rtol=1e-5)
  agree(grads, trained(other, name, gradient_of), 2e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_ten_steps_of_adamw_end_where_those_of_peft_do(name):
  # Columns of W have norm one, so that DoRA's relative magnitude is PEFT's absolute one: AdamW's
  # steps have the size of the learning rate, and the two parametrisations else move differently.
  model, params, frozen, batch, other = make_pair(name, unit_columns=True)
  start = params
  groups = {True: [], False: []}
  for key, parameter in other.named_parameters():
    if parameter.requires_grad:
      groups["router" not in key and "magnitude" not in key].append(parameter)
  torch_optimizer = torch.optim.AdamW(
    [
      {"params": groups[True], "weight_decay": OPTIMIZER.weight_decay},
      {"params": groups[False], "weight_decay": 0.0},
    ],
    lr=LEARNING_RATE,
    betas=(OPTIMIZER.b1, OPTIMIZER.b2),
    eps=OPTIMIZER.eps,
  )
  everything = groups[True] + groups[False]
  features = torch.tensor(batch.features, dtype=torch.float64)
  targets = torch.tensor(batch.targets)
  norms = []
  for count in range(10):
    factor = count / 2 if count < 2 else (1 + np.cos(np.pi * (count - 2) / 8)) / 2
    for group in torch_optimizer.param_groups:
      group["lr"] = LEARNING_RATE * factor
    torch_optimizer.zero_grad()
    torch.mean((predict(other, name, features) - targets) ** 2).backward()
    norms.append(torch.nn.utils.clip_grad_norm_(everything, OPTIMIZER.clip).item())
    torch_optimizer.step()
  assert min(norms) > OPTIMIZER.clip  # the clipping is part of the comparison

  tx = optimizer.make(OPTIMIZER)

  def gradients(*arguments):
    return evaluate(*arguments)[1:]

  state = step.TrainState(np.int32(0), params, tx.init(params), np.float32(LEARNING_RATE))
  for count in range(10):
    state, metrics = step.train_step(state, frozen, batch, model, tx, gradients)
    np.testing.assert_allclose(metrics["train/grad_norm"], norms[count], rtol=1e-3)
  moved = jax.tree.map(lambda after, before: np.asarray(after - before), state.params, start)
  expected = trained(other, name, value_of)
  expected = jax.tree.map(lambda after, before: after - before, expected, reference.double(start))
  # Ten steps divide by the root of the second moment, which makes small gradients' errors larger.
  agree(moved, expected, 1e-3)


def test_lily_of_peft_weighs_experts_by_the_mean_over_the_tokens_of_a_call():
  """The deviation: one B per call there, one per token here; equal where all tokens agree."""
  model, params, frozen, batch, other = make_pair("lily")
  features = torch.tensor(batch.features, dtype=torch.float64)

  def ours(params):
    return evaluate(params, frozen, batch, model)[0]

  gap = np.abs(other(features).detach().numpy() - ours(params)).max()
  assert gap > 0.01
  even = jax.tree_util.tree_map_with_path(
    lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "router" else leaf, params
  )
  trained(other, "lily", value_of, write=even)
  np.testing.assert_allclose(ours(even), other(features).detach().numpy(), rtol=1e-5, atol=1e-5)
