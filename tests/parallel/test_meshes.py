"""A train step on eight devices equals the step on one, and moves no unnecessary arrays.

Tolerance: sums over rows, widths and answers run in another order, which changes them by some units
in the last place of float32 (6e-8) of the largest term. Losses agree to 1e-5 relative, gradients to
2e-5 of the largest entry of their array. Adam divides by the size of the gradient: two steps can
carry four times that error, relative to the gradient of the entry, times the learning rate.
"""

import collections
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHARDED = ("data", "fsdp", "mixed")
GRADIENT = 2e-5
RATE = 0.05  # of `mesh_cases`
BLOCKS = "3"  # of `mesh_cases.BLOCKS`


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
  """All cases, from one process with eight devices: arrays by path, and facts by case."""
  folder = tmp_path_factory.mktemp("meshes")
  arrays, facts = folder / "arrays.npz", folder / "facts.json"
  done = subprocess.run(
    [sys.executable, "tests/parallel/mesh_cases.py", str(arrays), str(facts)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return dict(np.load(arrays)), json.loads(facts.read_text()), done.stderr


def of_case(arrays, case):
  return {path[len(case) :]: leaf for path, leaf in arrays.items() if path.startswith(case)}


@pytest.mark.parametrize(
  ("model", "adapter", "mesh"),
  [
    *itertools.product(("decoder", "mlp"), ("lora", "queryable"), SHARDED),
    ("decoder", "queryable", "atoms"),
  ],
)
def test_losses_gradients_and_updates_equal_those_of_one_device(model, adapter, mesh, cases):
  arrays, _, _ = cases
  expected = of_case(arrays, f"{model}/{adapter}/one")
  actual = of_case(arrays, f"{model}/{adapter}/{mesh}")
  assert actual.keys() == expected.keys() and len(actual) >= 9
  for path, leaf in expected.items():
    kind = path[1]  # of (loss, gradients, parameters)
    if kind == "0":
      np.testing.assert_allclose(actual[path], leaf, rtol=1e-5, err_msg=path)
    elif kind == "1":
      assert np.abs(leaf).max() > 0, path
      np.testing.assert_allclose(
        actual[path], leaf, rtol=0, atol=GRADIENT * np.abs(leaf).max(), err_msg=path
      )
    else:
      grad = np.abs(expected[f"[1]{path[3:]}"])
      tolerance = RATE * (1e-3 + 4 * GRADIENT * grad.max() / np.maximum(grad, 1e-12))
      assert (np.abs(actual[path] - leaf) <= tolerance).all(), path
      assert np.median(np.abs(actual[path] - leaf)) < 1e-4 * RATE, path


def test_a_sharded_model_generates_the_tokens_of_the_whole_one(cases):
  arrays, _, _ = cases
  tokens = arrays["generation/queryable/mixed"]
  np.testing.assert_array_equal(tokens, arrays["generation/queryable/one"])
  assert tokens.shape == (4, 5)


def moved(facts, case):
  return [tuple(collective) for collective in facts[case]["collectives"]]


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_one_layer_at_a_time_is_gathered_never_the_stacked_base(adapter, cases):
  _, facts, _ = cases
  for mesh in ("fsdp", "mixed"):
    gathers = [
      collective
      for collective in moved(facts, f"decoder/{adapter}/{mesh}")
      if "gather" in collective[0]
    ]
    layer = "[16,32]" if mesh == "fsdp" else "[16,16]"  # the q map, gathered over fsdp only
    assert [shape for _, shape, in_loop in gathers if in_loop and layer in shape], gathers
    whole = [shape for _, shape, _ in gathers if shape.partition("[")[2].startswith(f"{BLOCKS},")]
    assert not whole
  # With copies of everything nothing is gathered.
  assert not [kind for kind, *_ in moved(facts, f"decoder/{adapter}/data") if "gather" in kind]


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_every_device_holds_its_share_of_base_adapter_and_moments(adapter, cases):
  _, facts, _ = cases
  for kind in ("base", "adapter", "moments"):
    whole = facts[f"decoder/{adapter}/one"]["local"][kind]
    assert facts[f"decoder/{adapter}/data"]["local"][kind] == whole
    # The memory and routers are not split.
    replicated = 0.0 if adapter == "lora" or kind == "base" else 0.3
    # Norms are not split either. A factor [embed, rank] is split over fsdp only, for any tensor.
    for mesh, least, most in (
      ("fsdp", 1 / 8, 1.35 / 8),
      ("mixed", 1 / 4, 1.35 / 4 if kind == "base" else 0.35),
    ):
      local = facts[f"decoder/{adapter}/{mesh}"]["local"][kind]
      assert least * whole <= local < (most + replicated) * whole


def per_token(facts, case):
  """Counts of the token arrays that collectives inside the loops move."""
  counts = collections.Counter()
  for kind, shape, in_loop in moved(facts, case):
    sizes = shape.partition("[")[2].rstrip("]").split(",")
    if in_loop and "10" in sizes:  # `mesh_cases.LENGTH`
      counts[kind, shape] += 1
  return counts


@pytest.mark.parametrize("mesh", SHARDED)
def test_routing_moves_no_token_arrays_beyond_those_of_lora(mesh, cases):
  _, facts, _ = cases
  lora = per_token(facts, f"decoder/lora/{mesh}")
  queryable = per_token(facts, f"decoder/queryable/{mesh}")
  assert queryable == lora
  assert bool(lora) == (mesh == "mixed")  # tensor parallelism sums over the tensor axis


def test_no_array_is_replicated_to_change_its_layout(cases):
  assert "Involuntary full rematerialization" not in cases[2]
