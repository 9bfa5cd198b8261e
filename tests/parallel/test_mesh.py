"""The mesh from a config: sizes, rules, and one-line errors for sizes that do not fit."""

import math

import jax
import pytest

from configs import llm
from qlora_jax import errors
from qlora_jax.parallel import mesh as mesh_lib


def message_of(function, *arguments, **options):
  with pytest.raises(errors.UserError) as caught:
    function(*arguments, **options)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ("sizes", "count", "resolved"),
  [
    ({}, 8, (1, 1, 8, 1)),
    ({"data": 2, "tensor": 2}, 8, (1, 2, 2, 2)),
    ({"slice": 2, "fsdp": 4, "tensor": -1}, 64, (2, 1, 4, 8)),
    ({"data": 8, "fsdp": 1}, 8, (1, 8, 1, 1)),
  ],
)
def test_minus_one_takes_the_remaining_devices(sizes, count, resolved):
  assert mesh_lib.resolve(mesh_lib.MeshConfig(**sizes), count) == resolved


def test_sizes_that_do_not_fit_name_the_nearest_that_do():
  text = message_of(mesh_lib.resolve, mesh_lib.MeshConfig(fsdp=3, tensor=2), 8)
  assert "needs 6 devices, but there are 8" in text
  assert "nearest: slice=1, data=1, fsdp=4, tensor=2" in text
  text = message_of(mesh_lib.resolve, mesh_lib.MeshConfig(tensor=3), 8)
  assert "3 does not divide 8" in text and "tensor=4" in text
  sizes = mesh_lib.nearest((1, 3, 5, 2), 64)
  assert math.prod(sizes) == 64
  assert sorted(sizes) == [1, 2, 4, 8] or sorted(sizes) == [1, 4, 4, 4]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"data": 0}, "mesh.data: 0"),
    ({"data": -1}, "only one axis can be -1"),
    ({"rules": (("width", "fsdp"),)}, "no parameter has an axis 'width'"),
    ({"rules": (("embed", "model"),)}, "cannot be split over 'model'"),
  ],
)
def test_an_error_in_the_config_is_one_line(fields, message):
  assert message in message_of(mesh_lib.MeshConfig, **fields)


def test_the_config_of_language_models_has_a_mesh_of_all_devices():
  layout = mesh_lib.from_config(llm.get_config().mesh)
  assert layout.rules == mesh_lib.DEFAULT_RULES
  mesh = mesh_lib.make(layout)
  assert mesh.axis_names == mesh_lib.AXES and mesh.size == len(jax.devices())


def test_rules_survive_a_config_that_was_written_and_read():
  layout = mesh_lib.from_config({"tensor": 2, "rules": [["atoms", ["fsdp", "tensor"]]]})
  assert layout.rules == (("atoms", ("fsdp", "tensor")),)


def test_a_batch_that_the_data_axes_do_not_divide_names_two_that_they_do():
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), mesh_lib.AXES)
  mesh_lib.check_batch(mesh, 24, 3)
  text = message_of(mesh_lib.check_batch, mesh, 10)
  assert "optimizer.batch_size: 10" in text and "use 8 or 12" in text
  assert "3 micro-batches; use 12" in message_of(mesh_lib.check_batch, mesh, 8, 3)
