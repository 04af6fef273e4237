"""Small kernels, written by hand, whose cycles can be counted by hand."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.tpu_compiler import chips
from pallas_kernels.tpu_compiler import listing
from pallas_kernels.tpu_compiler import schedule
from pallas_kernels.tpu_compiler.values import ScheduleError
from pallas_kernels.tpu_compiler.values import UnknownInstructionError
from pallas_kernels.tpu_compiler.values import UnknownValueError

# A copy takes bytes / 8 + 100 cycles to read, bytes / 8 + 50 to write.
_CHIP = dataclasses.replace(
  chips.CHIPS['v5e'], dma=chips.DmaTiming(100.0, 50.0, 8.0)
)
_FLAG = "#allocation1 [shape = 's32[1]', space=sflag, size = 0x4, offset = 0x4]"
_SMEM = (
  "#allocation2 [shape = 's32[8]', space=smem, size = 0x20, offset = 0x10]"
)
_VMEM = (
  "#allocation3 [shape = 'u8[4096]', space=vmem, size = 0x1000, offset = 0]"
)
_CORE = (
  "#allocation4 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, "
  "fixed_abs, tag = 'smem constant byte address 0x4 - core index']"
)
_ALLOCATIONS = '\n'.join([_FLAG, _SMEM, _VMEM, _CORE])
_SCALARS = (
  '%s1_s1 = inlined_call_operand.smem [shape: s32[4], index: 0, kind: input]'
)
_ARRAY = (
  '%s2_s2 = inlined_call_operand.hbm [shape: f32[1024], index: 1, kind: input]'
)
# Five bundles: the branch at 0x1 and its four delay slots.
_LOOP = [
  ['%s9_s5 = sphi %s8_s5, %s10_s5'],
  [
    '%s10_s5 = sadd.s32 1, %s9_s5',
    '%p11_p0 = scmp.ge.s32.totalorder %s10_s5, {trips}',
  ],
  ['%12 = sbr.rel (!%p11_p0) target bundleno = 1 (0x1), region = 2'],
  [],
  [],
  [],
  [],
]


def _parse(bundles, slots=''):
  lines = [
    f'{address:#x} : {{ {"  ;;  ".join(bundle)} }}'
    for address, bundle in enumerate(bundles)
  ]
  return listing.parse('kernel', '\n'.join(lines), _ALLOCATIONS, slots)


def _run(bundles, values=None, chip=_CHIP, slots=''):
  return schedule.run_listing(_parse(bundles, slots), chip, values)


def _loop(trips, before=()):
  """One bundle, then seven per trip."""
  start = ['%s8_s5 = smov.u32 0', *before]
  return [start, *([i.format(trips=trips) for i in b] for b in _LOOP)]


def test_a_bundle_is_a_cycle_empty_or_not():
  result = _run([['%s1_s1 = smov.u32 4'], [], []])
  assert (result.cycles, result.stall_cycles) == (3, 0)


@pytest.mark.parametrize('trips', [1, 2, 10])
def test_loop(trips):
  result = _run(_loop(trips))
  assert result.cycles == 1 + 7 * trips
  (loop,) = result.loops
  assert loop == schedule.Loop(1, 7, trips, 7 * trips)


def test_loop_length_from_an_operand():
  bundles = _loop('%s7_s7', [_SCALARS])
  bundles.insert(1, [])  # The loop now starts at bundle 2.
  bundles[0].append('%s7_s7 = sld [smem:[%s1_s1 + $0x2]]')
  bundles[4] = [bundles[4][0].replace('bundleno = 1 (0x1)', 'bundleno = 2')]
  values = {0: np.array([9, 9, 5, 9], np.int32)}
  assert _run(bundles, values).cycles == 2 + 7 * 5
  with pytest.raises(UnknownValueError, match='control flow needs a value'):
    _run(bundles)


def test_a_taken_branch_skips_all_but_its_delay_slots():
  skip = '%1 = sbr.rel target bundleno = 8 (0x8), region = 3'
  bundles = [[skip], [], [], [], [], ['%2 = shalt.err'], [], [], []]
  assert _run(bundles).cycles == 5 + 1
  slow = dataclasses.replace(_CHIP, delay_slots=6)
  bundles[5] = []
  assert _run(bundles, chip=slow).cycles == 7 + 1


_COPY = (
  '%4 = dma.hbm_to_vmem [thread:$0]  hbm=%s2_s2, size_in_granules=8, '
  'vmem=[#allocation3], dst_syncflagno=[#allocation1], src_stride=4'
)
_WAIT = '%5 = dma.done.wait [#allocation1], 8'


def test_waiting_for_a_copy():
  result = _run([[_ARRAY], [_COPY], [_WAIT], []])
  # Issued at 1: 8 granules are 256 bytes, 32 cycles, then the latency.
  assert result.cycles == 1 + 32 + 100 + 2
  assert result.stall_cycles == 131
  assert result.stalls == ((2, 131.0),)
  assert (result.bytes_read, result.bytes_written) == (256, 0)
  ((address, transfer),) = result.transfers
  assert address == 1
  assert (transfer.kind, transfer.count, transfer.bytes) == (
    'hbm_to_vmem',
    1,
    256,
  )


def test_work_hides_a_copy():
  bundles = [[_ARRAY], [_COPY], *[[]] * 200, [_WAIT], []]
  result = _run(bundles)
  assert (result.cycles, result.stall_cycles) == (len(bundles), 0)


def test_waiting_for_what_nobody_sends():
  with pytest.raises(ScheduleError, match='bundle 0x0 waits for ever'):
    _run([[_WAIT]])


def test_semaphores_count():
  taken = '%6 = vsyncadd [#allocation1], 4294967288'
  result = _run(
    [[_ARRAY], [_COPY], [_WAIT], [taken], [_COPY], [_WAIT], [taken], []]
  )
  # The second copy is issued two cycles after the first wait's end.
  assert result.cycles == 133 + 2 + 132 + 3
  with pytest.raises(ScheduleError, match='holds 0'):
    _run([[_ARRAY], [_COPY], [_WAIT], [taken], [_WAIT]])


def test_a_copy_into_smem_carries_values():
  # v5e counts HBM in steps of 512 bytes, copies in granules of 32.
  granules = '%s3_s3 = sshll.u32 %s2_s2, 4'
  copy = (
    '%4 = dma.hbm_to_smem hbm=%s3_s3, size_in_granules=1, '
    'smem=[#allocation2], dst_syncflagno=[#allocation1]'
  )
  bundles = _loop('%s7_s7', [_ARRAY, granules])
  loop = bundles[1:]
  loop[2] = [loop[2][0].replace('bundleno = 1 (0x1)', 'bundleno = 4')]
  head = [
    bundles[0],
    [copy],
    ['%5 = dma.done.wait [#allocation1], 1'],
    ['%s7_s7 = sld [smem:[#allocation2 + $0x3]]'],
  ]
  values = {1: np.arange(1024, dtype=np.float32).view(np.int32)}
  values[1][3] = 6
  result = _run([*head, *loop], values)
  # The stall: issued at 1, 4 cycles for 32 bytes, waited for from 2.
  assert result.cycles - result.stall_cycles == 4 + 7 * 6
  assert result.stall_cycles == 1 + 4 + 100 - 2
  with pytest.raises(UnknownValueError, match='operand 1, f32.1024., whose'):
    _run([*head, *loop])


def test_a_failed_bounds_check():
  bundles = [
    ['%p1_p0 = scmp.lt.s32.totalorder 4294967295, 0'],
    ['%2 = shalt.err (!%p1_p0)'],
    ['%3 = shalt.err (%p1_p0)'],
  ]
  with pytest.raises(ScheduleError, match='bounds check at 0x2 failed'):
    _run(bundles)


@pytest.mark.parametrize(
  'text',
  [
    '%s1_s1 = sfrobnicate.u32 1, 2',
    '%s1_s1 = sadd.f16 1, 2',
    '%p1_p1 = scmp.lt.f64 1, 2',
    '%s1_s1 = smov.u32 @7',
    '%1 = sbr.abs %s1_s1',
    '%1 = vsyncset.remote [#allocation1], 1',
    '%1 = vsyncadd.remote 1, 1',
    '%1 = dma.hbm_to_mars hbm=0, size_in_granules=1, mars=0, '
    'dst_syncflagno=[#allocation1]',
    '%1 = sdivrem.u32 4, 2',
    '%p1_p1 = vfrobnicate %v1_v0',
  ],
)
def test_an_unknown_instruction_is_an_error_with_its_text(text):
  with pytest.raises(UnknownInstructionError) as error:
    _run([[text]])
  assert text in str(error.value)


def test_an_unknown_allocation():
  with pytest.raises(ScheduleError, match='nothing of #allocation99'):
    _run([['%s1_s1 = smov.u32 [#allocation99]']])


def _result_of(*bundles):
  """What the last bundle leaves in %s9_s9, by running as many trips."""
  trips = _loop('%s9_s9')
  shift = len(bundles) + 1
  target = f'bundleno = {shift} (0x1)'
  trips[3] = [trips[3][0].replace('bundleno = 1 (0x1)', target)]
  trips = [trips[0], *trips[1:]]
  result = _run([trips[0], *([b] for b in bundles), *trips[1:]])
  return (result.cycles - shift) / 7


@pytest.mark.parametrize(
  'bundles, value',
  [
    (['%s9_s9 = sadd.s32 7, 4294967293'], 4),
    (['%s9_s9 = ssub.s32 9, 2'], 7),
    (['%s9_s9 = smul.u32 3, 5'], 15),
    (['%s9_s9 = sand.u32 13, 7'], 5),
    (['%s9_s9 = sshll.u32 3, 2'], 12),
    (['%s9_s9 = smin.u32 6, 4294967295'], 6),
    (['%s9_s9 = smax.s32 6, 4294967295'], 6),
    (['%s9_s9 = scalar_lea.vmem [#allocation3], -4088'], 0x1000 - 4088),
    (
      ['%8 = sdivrem.u32 17, 5, kind=kRem', '%s9_s9 = spop.drf %8'],
      2,
    ),
    (
      [
        '%8 = sdivrem.u32 17, 5, kind=kDivAndRem',
        '%s7_s7 = spop.drf %8',
        '%s9_s9 = spop.drf %8',
      ],
      2,
    ),
    (
      [
        '%p1_p1 = scmp.gt.s32.totalorder 1, 4294967295',
        '%s9_s9 = smov.u32 (%p1_p1, 3), 8',
      ],
      8,
    ),
    (
      [
        '%p1_p1 = scmp.gt.u32.totalorder 1, 4294967295',
        '%s9_s9 = smov.u32 (%p1_p1, 3), 8',
      ],
      3,
    ),
    (
      [
        '%p1_p1 = pmov 0',
        '%s9_s9 = smov.u32 2',
        '%s9_s9 = smov.u32 (%p1_p1), 8',
      ],
      2,
    ),
    (
      [
        '%4 = sst [smem:[#allocation2 + $0x1]] 11',
        '%s9_s9 = sld [smem:[#allocation2 + $0x1]]',
      ],
      11,
    ),
  ],
)
def test_scalar_results(bundles, value):
  assert _result_of(*bundles) == value


def test_slots_and_products():
  slots = '== CAPACITY:\nMATMUL, VSTORE:SPILL\n 4 1\n== USED:\n'
  rows = ['0 0', '0 0', '2 0', '0 1', *['0 0'] * 4]
  bundles = _loop(10)
  bundles[2] = [
    *bundles[2],
    '%20 = vmatmul.bf16.gmra.mxu0 %v1_v1',
    '%21 = vmatmul.f32.gmra.mxu1 %v1_v1',
  ]
  result = _run(bundles, slots=slots + '\n'.join(rows))
  assert result.cycles == 71
  assert result.slots == pytest.approx(
    {'MATMUL': 2 * 10 / (4 * 71), 'VSTORE:SPILL': 10 / 71}
  )
  assert result.spills == pytest.approx(10 / 71)
  assert result.matmuls == {'vmatmul.bf16': 10, 'vmatmul.f32': 10}
  # On v5e a 16-bit product holds one of four MXUs for 16 cycles, another 8.
  assert result.mxu_busy == pytest.approx(10 * (16 + 8) / (4 * 71))
  assert result.microseconds == pytest.approx(71 / 1500)
  assert result.mfu(1e6) == pytest.approx(1e6 / (71 / 1.5e9) / 197e12)


def test_two_cores_share_the_bandwidth():
  v5p = dataclasses.replace(chips.CHIPS['v5p'], dma=_CHIP.dma)
  core = '%s5_s5 = sld [smem:[#allocation4]]'
  both = _run([[_ARRAY, core], [_COPY], [_WAIT]], chip=v5p)
  assert both.cores == 2
  assert both.bytes == 512
  assert both.cycles == 1 + 64 + 100 + 1
  one = _run([[_ARRAY], [_COPY], [_WAIT]], chip=v5p)
  assert (one.cores, one.bytes, one.cycles) == (1, 256, 134)


def test_a_core_that_works_alone_has_all_the_bandwidth():
  v5p = dataclasses.replace(chips.CHIPS['v5p'], dma=_CHIP.dma)
  away = '%6 = sbr.rel (%p6_p6) target bundleno = 100000 (0x1), region = 1'
  bundles = [
    [_ARRAY, '%s5_s5 = sld [smem:[#allocation4]]'],
    ['%p6_p6 = scmp.ne.s32.totalorder %s5_s5, 0'],
    [away],
    *[[]] * 4,
    [_COPY],
    [_WAIT],
  ]
  result = _run(bundles, chip=v5p)
  assert result.cycles == 7 + 32 + 100 + 1
  assert result.bytes == 256


def test_two_cores_meet_at_a_barrier():
  v4 = dataclasses.replace(chips.CHIPS['v4'], dma=_CHIP.dma)
  # A semaphore's number, 2 or 3 for the core, then the chip.
  barrier = [
    ['%s5_s5 = sld [smem:[#allocation4]]'],
    ['%s6_s6 = sxor.u32 1, %s5_s5'],
    ['%s7_s7 = sshll.u32 %s6_s6, 14'],
    ['%s8_s8 = sor.u32 32768, %s7_s7'],
    ['%s9_s9 = sor.u32 [#allocation1], %s8_s8'],
    ['%10 = vsyncadd.remote %s9_s9, 1'],
    ['%11 = vwait.ge.trace [#allocation1], 1'],
    [],
  ]
  result = _run(barrier, chip=v4)
  assert (result.cores, result.cycles, result.stall_cycles) == (2, 8, 0)
  barrier[1] = ['%s6_s6 = smov.u32 %s5_s5']  # To itself.
  with pytest.raises(UnknownInstructionError, match='vsyncadd.remote %s9_s9'):
    _run(barrier, chip=v4)


def test_report_has_the_numbers():
  text = _run([[_ARRAY], [_COPY], [_WAIT], []]).report()
  assert 'kernel on v5e: 135 cycles, 0.09 us on 1 core(s)' in text
  assert 'stall at 0x2: 97.0%' in text
  assert 'copy at 0x1: hbm_to_vmem x 1, 256 bytes' in text
