"""Collectives are read from compiled programs: kinds, bytes, groups, and the trips of loops."""

import pytest

from qlora_jax.planning import estimate, hlo

# Shortened output of libtpu 0.0.42 and of XLA's CPU compiler.
TEXT = """HloModule jit_step

%cond (p: (s32[], bf16[80,4,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(80)
  %p = (s32[]{:T(128)}, bf16[80,4,64]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%all-reduce-scatter.7 (input: f32[64,16]) -> f32[4,16] {
  %input = f32[64,16]{0,1} parameter(0)
  %all-reduce.9 = f32[64,16]{0,1} all-reduce(%input), replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %slice = f32[4,16]{0,1} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4,16}
}

%body (p: (s32[], bf16[80,4,64])) -> (s32[], bf16[80,4,64]) {
  %all-gather.1 = bf16[1,64,16]{1,2,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, \
replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_0'}, dimensions={1}, \
metadata={op_name="jit(f)/while/body/blocks/layer_0/v/branch/dot"}
  %fusion.2 = f32[4,16]{0,1} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.7
  %permute = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,4]{1,0} collective-permute-done(%permute)
  %all-reduce.3 = (f32[4,4]{1,0}, /*index=1*/f32[2]{0}) all-reduce(%a, %b), \
replica_groups={{0,8},{1,9}}, to_apply=%add, metadata={op_name="blocks/router/dot"}
}

ENTRY %main (p: s32[]) -> s32[] {
  %loop = (s32[]{:T(128)}, bf16[80,4,64]{2,1,0:T(8,128)}, f32[80,9]{1,0}) while(%tuple), \
condition=%cond, body=%body, metadata={op_name="stack/while"}
  %all-reduce.4 = f32[] all-reduce(%s), replica_groups=[16,1]<=[16], to_apply=%add
}
"""


def test_every_kind_is_counted_with_its_bytes_groups_and_trips():
  by_kind = {collective.kind: collective for collective in hlo.collectives(TEXT)}
  assert set(by_kind) == {"all-gather", "reduce-scatter", "collective-permute", "all-reduce"}
  assert all(collective.times == 80 for collective in by_kind.values())
  assert (by_kind["all-gather"].bytes, by_kind["all-gather"].group) == (2048, 4)
  assert by_kind["all-gather"].wire == 2048 * 3 / 4
  assert (
    by_kind["reduce-scatter"].bytes == 4096 and by_kind["reduce-scatter"].wire == 4096 * 15 / 16
  )
  assert by_kind["collective-permute"].wire == 64
  assert by_kind["all-reduce"].bytes == 72 and by_kind["all-reduce"].wire == 72.0
  assert "router" in by_kind["all-reduce"].source
  assert estimate.by_kind(hlo.collectives(TEXT))["all-gather"] == {"count": 80, "bytes": 122_880.0}


def test_groups_that_span_slices_use_the_network_between_them():
  collectives = hlo.collectives(TEXT, chips_per_slice=8)
  across = {collective.kind for collective in collectives if collective.across}
  assert across == {"reduce-scatter", "all-reduce", "all-gather"}


def test_saved_bytes_count_stacked_arrays_that_are_not_arguments():
  assert hlo.saved_bytes(TEXT, 80, set()) == 80 * 4 * 64 * 2 + 80 * 9 * 4
  assert hlo.saved_bytes(TEXT, 80, {(80, 9)}) == 80 * 4 * 64 * 2
  assert hlo.saved_bytes(TEXT, 7, set()) == 0


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
  ],
)
def test_all_spellings_of_groups_are_read(text, groups):
  assert hlo._groups(text) == groups
