"""FLOPs and bytes counted in the text of a module."""

from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler import products

_MODULE = """\
HloModule jit_f, is_scheduled=true

%fused (stack: f32[4,8,128], i: s32[], x: f32[8,128]) -> f32[8,128] {
  %stack = f32[4,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  %layer = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i)
  ROOT %sum = f32[8,128]{1,0} add(%x, %layer)
}

%update (big: f32[4,8,128], y: f32[1,8,128], j: s32[]) -> f32[4,8,128] {
  %big = f32[4,8,128]{2,1,0} parameter(0)
  %y = f32[1,8,128]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %new = f32[4,8,128]{2,1,0} dynamic-update-slice(%big, %y, %j)
}

%body (t: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {
  %t = (s32[], f32[16,32]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%t), index=0
  %a = f32[16,32]{1,0} get-tuple-element(%t), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%k, %two)
  %product = f32[16,32]{1,0} dot(%a, %a), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}
  ROOT %out = (s32[], f32[16,32]{1,0}) tuple(%next, %product)
}

%condition (u: (s32[], f32[16,32])) -> pred[] {
  %u = (s32[], f32[16,32]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%u), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

ENTRY %main (p: f32[4,8,128], q: f32[8,128], n: s32[], m: f32[16,32]) -> f32[] {
  %p = f32[4,8,128]{2,1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %m = f32[16,32]{1,0} parameter(3)
  %vmem = f32[8,128]{1,0:T(8,128)S(1)} copy(%q)
  %added = f32[8,128]{1,0} fusion(%p, %n, %q), kind=kLoop, calls=%fused
  %bits = f32[1,8,128]{2,1,0} bitcast(%added)
  %stacked = f32[4,8,128]{2,1,0} fusion(%p, %bits, %n), kind=kLoop, \
calls=%update
  %one = s32[] constant(1)
  %start = (s32[], f32[16,32]{1,0}) tuple(%one, %m)
  %loop = (s32[], f32[16,32]{1,0}) while(%start), condition=%condition, \
body=%body
  %kernel = f32[8,128]{1,0} custom-call(%p), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"x","cost_estimate":{"flops":"100","bytes_accessed":"7"}}}
  ROOT %end = f32[] constant(0)
}
"""
_SLICE = 8 * 128 * 4


def test_flops_count_the_rounds_of_loops():
  program = hlo.parse(_MODULE)
  # The counter goes 1, 3, 5, 7: four rounds; and the kernel's own word.
  assert hlo.trips(program, program.instructions['loop']) == 4
  assert products.flops(program) == 4 * 2 * 16 * 32 * 32 + 100


def test_bytes_are_those_that_move():
  program = hlo.parse(_MODULE)
  count = lambda name: products.instruction_bytes(program, name)
  # What is kept in VMEM does not move.
  assert count('vmem') == _SLICE
  # A slice of the stack, the number, x, and the result.
  assert count('added') == 3 * _SLICE + 4
  # In place: the update is read and written, the rest stays.
  assert count('stacked') == 2 * _SLICE + 4
  assert count('kernel') == 7
  counted = products.bytes_accessed(program, {'kernel': 1000})
  assert counted - products.bytes_accessed(program) == 1000 - 7


def test_convolutions_that_the_compiler_makes_of_products():
  text = (
    'HloModule m\nENTRY %e (a: f32[64,8,256,2], b: f32[8,256,128,2]) -> f32[] '
    '{\n  %a = f32[64,8,256,2]{3,2,1,0} parameter(0)\n'
    '  %b = f32[8,256,128,2]{3,2,1,0} parameter(1)\n'
    '  ROOT %c = f32[64,8,128,1]{3,2,1,0} convolution(%a, %b), '
    'window={size=8x2 pad=7_7x0_0 rhs_reversal=1x0}, '
    'dim_labels=b0f1_0io1->b0f1\n}\n'
  )
  program = hlo.parse(text)
  # Along the first dimension, 8 outputs see 1 to 8 of 8 inputs on the way in.
  pairs = sum(range(1, 9))
  assert products.flops(program) == 2 * 64 * 128 * 256 * pairs * 2
  # With a stride of 2 and no padding one position is left, all of it valid.
  strided = text.replace(
    'window={size=8x2 pad=7_7x0_0 rhs_reversal=1x0}',
    'window={size=8x2 stride=2x1}',
  ).replace('%c = f32[64,8,128,1]', '%c = f32[64,1,128,1]')
  assert products.flops(hlo.parse(strided)) == 2 * 64 * 128 * 256 * 8 * 2
