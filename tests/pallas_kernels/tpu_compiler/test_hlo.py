"""Kernels and layouts in the text of a module."""

import pytest

from pallas_kernels.tpu_compiler import hlo

_MODULE = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (b: bf16[8,128], table: s32[3,200]) -> f32[8,128] {
  %b = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %table = s32[3,200]{1,0:T(4,128)} parameter(1)
  ROOT %kernel.7 = f32[8,128]{1,0} custom-call(%table, %b), \
custom_call_target="tpu_custom_call", metadata={op_name="all-reduce(x)"}
}
"""


def test_kernels_and_layouts():
  program = hlo.parse(_MODULE)
  assert list(hlo.pallas_kernels(program)) == ['kernel.7']
  assert hlo.operand_layouts(program, 'kernel.7') == {
    0: hlo.Layout((1, 0), ((4, 128),)),
    1: hlo.Layout((1, 0), ((8, 128), (2, 1))),
  }


def test_not_a_module():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule m\n')
