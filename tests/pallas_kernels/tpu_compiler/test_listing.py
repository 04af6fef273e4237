"""Listings in the format of both generations of the compiler."""

import pytest

from pallas_kernels.tpu_compiler import listing
from pallas_kernels.tpu_compiler.values import ScheduleError

_LISTING = """
= control target key start
LH: loop header
= control target key end

     0   :  { %7 = vsyncpa [#allocation4], 0  ;;  %s9_s0 = inlined_call_operand\
.hbm [shape: bf16[16,128], index: 0, kind: input, shape index: {}] /* the \
window; over
lines */ } /* Start region 0 */
   0x1 LH: > { %221 = shalt.err (!%p218_p4) /* BoundsCheck 0 for dma
hlo: matmul.1
 */ }
   0x2   :  {}
   0x3 PB: > > { %14 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s9_s0, \
/*size_in_granules=*/8, /*vmem=*/[#allocation3], /*dst_syncflagno=*/\
[#allocation4], /*src_stride=*/4 /*
base_bounds: (2, 1) */ }
"""
# libtpu 0.0.42: the check quotes its instruction, with that one's comments.
_NESTED = """
     0   : > { %3 = shalt.err (!%p2_p12) /* BoundsCheck 1 for %4 = \
dma.vmem_to_hbm /*vmem=*/%s7, /*hbm=*/%s9 /*
iteration_bounds: (4, 1) */
hlo: f
 */ ;;  %s5_s1 = smov.u32 4 }
"""


def test_bundles_and_comments():
  parsed = listing.parse('f', _LISTING)
  assert [len(b) for b in parsed.bundles] == [2, 1, 0, 1]
  (copy,) = parsed.bundles[3]
  assert copy.opcode == 'dma.hbm_to_vmem'
  assert copy.keywords == {
    'hbm': '%s9_s0',
    'size_in_granules': '8',
    'vmem': '[#allocation3]',
    'dst_syncflagno': '[#allocation4]',
    'src_stride': '4',
  }


def test_operands():
  (operand,) = listing.parse('f', _LISTING).operands
  assert operand == listing.Operand('s9_s0', 'hbm', 'bf16[16,128]', 0, True)


def test_nested_comments():
  ((halt, move),) = listing.parse('f', _NESTED).bundles
  assert (halt.opcode, halt.predicate, halt.negated) == (
    'shalt.err',
    'p2_p12',
    True,
  )
  assert (move.results, move.args) == (('s5_s1',), ('4',))


def test_select():
  i = listing.parse_instruction('%s3_s1 = smov.u32 (!%p2_p0, %s1_s4), 7')
  assert (i.predicate, i.negated, i.fallback) == ('p2_p0', True, '%s1_s4')
  assert i.args == ('7',)


def test_predicated_store():
  i = listing.parse_instruction(
    '%5 = sst [smem:[#allocation2 + $0x1]] (%p1_p1), %s4_s2'
  )
  assert i.args == ('[smem:[#allocation2 + $0x1]]', '%s4_s2')
  assert i.predicate == 'p1_p1'


def test_division_says_what_it_gives():
  text = '0x0 : { %9 = sdivrem.u32 %s1_s1, %s2_s2 /* kDivAndRem */ }'
  ((i,),) = listing.parse('f', text).bundles
  assert i.keywords == {'kind': 'kDivAndRem'}
  assert i.args == ('%s1_s1', '%s2_s2')


def test_allocations():
  found = listing.parse(
    'f',
    '0x0 : {}',
    "  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, "
    "fixed_abs, tag = 'smem constant byte address 0x4 - core index']\n"
    "    #allocation3 [shape = 'u8[4096]{0}', space=vmem, size = 0x1000, "
    "offset = 0x2000, scoped, tag = 'input window']\n",
  ).allocations
  assert found == {
    'allocation0': listing.Allocation(
      'smem', 4, True, 'smem constant byte address 0x4 - core index'
    ),
    'allocation3': listing.Allocation('vmem', 0x2000, False, 'input window'),
  }


@pytest.mark.parametrize(
  'text, predicate, negated',
  [
    ('%1 = sst [smem:[#allocation2]] (0), %s5_s3', '0', False),
    ('%2 = dma.general (!1), %s5_s3', '1', True),
    ('%3 = dma.general (%p7_p1), %s5_s3', 'p7_p1', False),
  ],
)
def test_predicates_that_the_compiler_has_folded(text, predicate, negated):
  instruction = listing.parse_instruction(text)
  assert (instruction.predicate, instruction.negated) == (predicate, negated)
  assert instruction.args[-1] == '%s5_s3'


def test_slots():
  slots = listing.parse(
    'f',
    '0x0 : {}\n0x1 : {}',
    slots='== CAPACITY:\nMXU, VSTORE:SPILL\n 4 1\n== USED:\n1 0\n2 1\n',
  ).slots
  assert slots == listing.Slots(
    ('MXU', 'VSTORE:SPILL'), (4, 1), ((1, 0), (2, 1))
  )


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'no bundles'),
    ('0x0 : {}\n0x2 : {}', 'bundle 0x2 is out of order'),
    ('0x0 : { /* no end }', 'does not end'),
    ('0x0 : { no end */ }', 'did not begin'),
    ('0x0 : { snop', 'not understood: 0x0 : { snop'),
  ],
)
def test_refuses(text, message):
  with pytest.raises(ScheduleError, match=message):
    listing.parse('f', text)
