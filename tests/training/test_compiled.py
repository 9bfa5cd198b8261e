"""Programs are let go of before a process runs out of mappings."""

import jax

from qlora_jax.training import compiled


def test_programs_are_let_go_of_only_where_they_hold_much():
  double = jax.jit(lambda x: 2 * x)
  double(1.0)
  assert not compiled.clear_if_needed(1.0) and double._cache_size() == 1
  assert compiled.clear_if_needed(0.0) and double._cache_size() == 0
  assert double(2.0) == 4.0
