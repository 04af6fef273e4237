"""The clock of a schedule, on small modules."""

import pytest

from pallas_kernels.tpu_compiler import collectives
from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler import timeline
from pallas_kernels.tpu_compiler.chips import CHIPS
from pallas_kernels.tpu_compiler.network import Network

_CHIP = CHIPS['v5e']
_HEAD = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}
"""


def _work(name, cycles):
  return (
    f'  %{name} = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%f, '
    f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}\n'
  )


def _run(body, more='', kernel_cycles=lambda name: 0.0):
  text = (
    f'{_HEAD}{more}\nENTRY %main (p: f32[1000000]) -> f32[] {{\n'
    '  %p = f32[1000000]{0} parameter(0)\n' + body + '}\n'
  )
  program = hlo.parse(text)
  network = Network.of(_CHIP, [(0, 0), (0, 1)])
  found = collectives.find(program, {'x': 2}, network)
  return timeline.run(program, _CHIP, found, kernel_cycles), found


_START = (
  '  %s = (f32[1000000]{0}, f32[2000000]{0}) all-gather-start(%p), '
  'replica_groups={{0,1}}, dimensions={0}\n'
)
_DONE = '  %d = f32[2000000]{0} all-gather-done(%s)\n'


def test_work_hides_what_is_asynchronous():
  none, (gather,) = _run(_START + _DONE)
  cycles = gather.milliseconds * 1.5e6
  # 4 MB over a link of 50 GB/s, and a hop.
  assert gather.milliseconds == pytest.approx(0.081)
  assert none.exposed == {'s': pytest.approx(cycles)}
  half, _ = _run(_START + _work('w', int(cycles / 2)) + _DONE)
  assert half.cycles == pytest.approx(cycles)
  assert half.exposed['s'] == pytest.approx(cycles / 2, rel=1e-3)
  hidden, _ = _run(_START + _work('w', 10**6) + _DONE)
  assert hidden.cycles == hidden.compute == 10**6
  assert not sum(hidden.exposed.values())


def test_collectives_of_one_axis_wait_for_each_other():
  second = _START.replace('%s', '%s2'), _DONE.replace('%s', '%s2')
  both, found = _run(_START + second[0] + _DONE + second[1].replace('%d', '%e'))
  assert both.cycles == pytest.approx(2 * found[0].milliseconds * 1.5e6)


def test_what_is_not_asynchronous_is_exposed():
  text = (
    '  %r = f32[1000000]{0} all-reduce(%p), replica_groups={{0,1}}, '
    'to_apply=%add\n'
  )
  line, (reduce,) = _run(_work('w', 1000) + text)
  assert line.cycles == pytest.approx(1000 + reduce.milliseconds * 1.5e6)
  assert not reduce.asynchronous


def test_a_collective_that_goes_on_in_fusions():
  more = ''.join(
    f'\n%{name} (q: f32[4]) -> f32[8] {{\n  %q.{k} = f32[4]{{0}} parameter(0)\n'
    f'  ROOT %g.{k} = f32[1000000]{{0}} all-gather(%q.{k}), channel_id=3, '
    'replica_groups={{0,1}}\n}\n'
    for k, name in enumerate(('first', 'async_collective_fusion', 'last'))
  )
  names = 'first', 'async_collective_fusion', 'last'
  body = ''.join(
    f'  %part{k} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%{name}'
    + (', x={"estimated_cycles":"40000"}\n' if k == 1 else '\n')
    for k, name in enumerate(names)
  )
  line, (gather,) = _run(body, more)
  assert gather.parts == ('part0', 'part1', 'part2')
  assert line.compute == 40000
  assert line.cycles == pytest.approx(gather.milliseconds * 1.5e6)


def test_loops_and_kernels():
  loop = """
%body (t: (s32[])) -> (s32[]) {
  %t = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %k.1 = f32[8]{0} custom-call(%t), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[]) tuple(%next)
}

%known (u: (s32[])) -> pred[] {
  %u = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}

%unknown (v: (s32[])) -> pred[] {
  %v = (s32[]) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""
  body = (
    '  %zero = s32[] constant(0)\n  %start = (s32[]) tuple(%zero)\n'
    '  %w.1 = (s32[]) while(%start), condition=%known, body=%body\n'
  )
  line, _ = _run(body, loop, lambda name: 100.0)
  assert line.kernels == {'k.1': 500.0}
  assert not line.unknown
  line, _ = _run(body.replace('%known', '%unknown'), loop, lambda name: 100.0)
  assert line.kernels == {'k.1': 100.0}
  assert list(line.unknown) == ['w.1']

  def refuse(name):
    raise ValueError('no table\nmore')

  line, _ = _run(body, loop, refuse)
  assert line.unknown == {'k.1': 'no table'}


def test_copies_are_waited_for():
  copy = (
    '  %c = (f32[1000000]{0:S(1)}, f32[1000000]{0}, u32[]) copy-start(%p)\n'
    '  %e = f32[1000000]{0:S(1)} copy-done(%c)\n'
  )
  line, _ = _run(copy)
  assert line.copies == pytest.approx(4e6 / 490.9 + 655, rel=1e-3)
  host, _ = _run(copy.replace('S(1)', 'S(5)'))
  assert host.copies == pytest.approx(4e6 / 16 * 1.5, rel=1e-3)
