"""Collectives in the text of a module."""

import pytest

from pallas_kernels.tpu_compiler import collectives
from pallas_kernels.tpu_compiler import hlo

_MODULE = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%fused (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), \
channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[64]{0} get-tuple-element(%t), index=1
  %all-reduce.2 = f32[64]{0:T(128)} all-reduce(%v), channel_id=1, \
replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %out = (s32[], f32[64]{0}) tuple(%i, %all-reduce.2)
}

%counts_to_nine (u: (s32[], f32[64])) -> pred[] {
  %nine = s32[]{:T(128)} constant(9)
  %u = (s32[], f32[64]{0}) parameter(0)
  %count = s32[] get-tuple-element(%u), index=0
  ROOT %lt = pred[] compare(%count, %nine), direction=LT
}

%body.2 (w: (s32[], f32[64])) -> (s32[], f32[64]) {
  %w = (s32[], f32[64]{0}) parameter(0)
  %all-reduce.4 = f32[64]{0:T(128)} all-reduce(%w), to_apply=%add
  ROOT %inner = (s32[], f32[64]{0}) while(%w), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"12"}}
}

%condition (t.1: (s32[], f32[64])) -> pred[] {
  %t.1 = (s32[], f32[64]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[64], b: bf16[8,128], table: s32[3,200]) -> f32[64] {
  %a = f32[64]{0:T(128)} parameter(0)
  %b = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %table = s32[3,200]{1,0:T(4,128)} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64]{0}) tuple(%zero, %a)
  %while.1 = (s32[], f32[64]{0}) while(%start), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %while.2 = (s32[], f32[64]{0}) while(%start), condition=%counts_to_nine, \
body=%body.2
  %permute-start = (f32[64]{0}, f32[64]{0}, u32[], u32[]) \
collective-permute-start(%a), channel_id=2, \
source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %permute-done = f32[64]{0} collective-permute-done(%permute-start)
  %wide = bf16[32,128]{1,0} fusion(%b), kind=kCustom, calls=%fused
  %hidden = bf16[32,128]{1,0} fusion(%b), kind=kCustom, \
calls=%async_collective_fusion.3
  %goes-on = bf16[32,128]{1,0} fusion(%b), kind=kCustom, \
calls=%async_collective_fusion.4
  %kernel.7 = f32[8,128]{1,0} custom-call(%table, %b), \
custom_call_target="tpu_custom_call", metadata={op_name="all-reduce(x)"}
  ROOT %result = f32[64]{0} add(%permute-done, %a)
}

%async_collective_fusion.3 (q: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.5 = bf16[32,128]{1,0} all-gather(%q), \
channel_id=9, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%async_collective_fusion.4 (r: bf16[8,128]) -> bf16[32,128] {
  %r = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.6 = bf16[32,128]{1,0} all-gather(%r), \
channel_id=9, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}
"""
_MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}


@pytest.fixture(scope='module')
def found():
  return {c.name: c for c in collectives.find(hlo.parse(_MODULE), _MESH)}


def test_finds_all_and_no_others(found):
  assert list(found) == [
    'all-gather.9',
    'all-reduce.2',
    'all-reduce.4',
    'permute-start',
    'all-gather.5',
  ]


def test_groups_and_axes(found):
  # [2,4]<=[8]: rows of the devices in order.
  assert found['all-gather.9'].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
  assert found['all-gather.9'].axes == ('fsdp', 'tensor')
  # [4,2]<=[2,4]T(1,0): the transpose, so pairs that are four apart.
  assert found['all-reduce.2'].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
  assert found['all-reduce.2'].axes == ('data',)
  assert found['permute-start'].axes == ('tensor',)
  assert found['all-gather.5'].axes == ('data', 'fsdp')


def test_bytes_are_the_larger_side(found):
  assert found['all-gather.9'].bytes == 32 * 128 * 2
  assert found['all-reduce.2'].bytes == 64 * 4
  # The start's tuple has the operand, the result and two counters.
  assert found['permute-start'].bytes == 64 * 4


def test_counts_come_from_the_loops(found):
  # Twelve times from the entry, and as often in each of nine rounds.
  assert found['all-reduce.2'].count == 12 + 9 * 12
  assert found['all-reduce.4'].count == 9
  assert found['all-reduce.4'].groups == (tuple(range(8)),)
  assert found['permute-start'].count == 1


def test_which_are_asynchronous(found):
  assert found['permute-start'].asynchronous
  assert found['all-gather.5'].asynchronous
  assert not found['all-gather.9'].asynchronous
  assert not found['all-reduce.2'].asynchronous


def test_summary_adds_up_equal_kinds(found):
  lines = collectives.summary(found.values())
  assert lines[0] == (
    f'all-reduce over data, exposed: 120 x, {120 * 256:,} bytes'
  )
  assert len(lines) == 5


@pytest.mark.parametrize(
  'groups, axes',
  [
    ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", ('fsdp',)),
    ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','fsdp'}", ('data', 'fsdp')),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ('tensor',)),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", ('data',)),
    ("mesh['x'=4,'y'=2], device_ids=(0,4,1,5,2,6,3,7) {'y'}", ('data',)),
  ],
)
def test_groups_named_by_axes(groups, axes):
  text = 'ENTRY %m (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n'
  text += f'  %r = f32[4]{{0}} all-reduce(%a), replica_groups={groups}, x=1\n}}'
  (collective,) = collectives.find(hlo.parse(text), _MESH)
  assert collective.axes == axes


def test_groups_in_an_unknown_notation():
  text = 'ENTRY %m (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n'
  for groups in ("mesh['x'=8] {'x':(1)2}", 'pairs(0,1)'):
    line = (
      f'  %r = f32[4]{{0}} all-reduce(%a), replica_groups={groups}, x=1\n}}'
    )
    with pytest.raises(ValueError, match='not understood'):
      collectives.find(hlo.parse(text + line), _MESH)


def test_groups_along_no_axis():
  text = 'ENTRY %m (a: f32[4]) -> f32[4] {\n  %a = f32[4]{0} parameter(0)\n'
  text += (
    '  ROOT %r = f32[4]{0} all-reduce(%a), '
    'replica_groups={{0,3},{1,2},{4,7},{5,6}}, to_apply=%add\n}\n'
  )
  (collective,) = collectives.find(hlo.parse(text), _MESH)
  assert collective.axes == ()
  assert '4 groups of 2' in collective.report()
