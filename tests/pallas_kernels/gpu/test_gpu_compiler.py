"""What is read of the compiler's output; and the compiler itself."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels import gpu_compiler
from pallas_kernels.common import hopper
from pallas_kernels.gpu_compiler import sass

_LISTING = """
.text.kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] 
.L_x_1:
   -:-:-:-:12        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 
   -:-:1:Y:04        /*0020*/              @!P1 MUFU.EX2 R6, R24 
.L_x_2:
   2:-:-:Y:05        /*0030*/              @P0 BRA `(.L_x_2) 
   2:-:-:Y:05        /*0040*/              @UP0 BRA `(.L_x_1) 
   -:-:-:Y:05        /*0050*/                   EXIT 
.L_x_3:
   -:-:-:Y:00        /*0060*/                   BRA `(.L_x_3) 
"""  # noqa: E501, W291

needs_compiler = pytest.mark.skipif(
  not gpu_compiler.is_installed(), reason='needs the GPU compiler'
)


def test_loops_of_a_listing():
  [loop] = [l for l in sass.loops(_LISTING) if len(l.instructions) > 1]
  assert loop.counts == {'HGMMA': 1, 'MUFU': 1, 'BRA': 2}
  assert (loop.tensor_cycles, loop.mufu_cycles, loop.issue_cycles) == (
    128,
    8,
    4,
  )
  assert loop.tensor_share == 1
  assert [i.stall for i in loop.instructions] == [12, 4, 5, 5]


def _product(num_accumulators):
  """[64,64] x [64,256], whose sums are kept apart so many times."""

  def body(a, b, o, a_smem, b_smem, o_smem, barrier):
    plgpu.copy_gmem_to_smem(a, a_smem, barrier)
    plgpu.copy_gmem_to_smem(b, b_smem, barrier)
    plgpu.barrier_wait(barrier)

    def multiply(*accumulators):
      @pl.loop(0, 1000)
      def _(_):
        for acc in accumulators:
          plgpu.wgmma(acc, a_smem, b_smem)

      return [acc[...] for acc in accumulators]

    shapes = [plgpu.ACC((64, 256))] * num_accumulators
    o_smem[...] = sum(pl.run_scoped(multiply, *shapes)).astype(o.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem, o)
    plgpu.wait_smem_to_gmem(0)

  bf16 = jnp.bfloat16
  return hopper.kernel(
    body,
    name='product',
    out=jax.ShapeDtypeStruct((64, 256), bf16),
    grid=dict(block=1),
    scratch=[hopper.tile(s, bf16) for s in ((64, 64), (64, 256), (64, 256))]
    + [plgpu.Barrier(num_arrivals=2)],
  )


_SHAPES = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 64), (64, 256))]


@needs_compiler
def test_registers_and_loops():
  compiled = gpu_compiler.compile_for(_product(1), *_SHAPES)
  [kernel] = compiled.kernels
  assert kernel.name.startswith('product')
  assert 128 < kernel.registers < 256 and not kernel.spill_bytes
  assert not kernel.warnings
  num = kernel.main_loop.counts['HGMMA']
  assert num % 4 == 0 and kernel.main_loop.tensor_cycles == num * 128 > 0
  assert 'mosaic_gpu' in compiled.hlo


@needs_compiler
def test_spills_are_seen():
  [kernel] = gpu_compiler.compile_for(_product(3), *_SHAPES).kernels
  assert kernel.spill_bytes > 0 and kernel.registers == 255


@needs_compiler
def test_what_the_compiler_refuses():
  def too_much(x):
    scratch = [plgpu.SMEM((256, 1024), jnp.float32)]
    copy = lambda x, o, _: o.__setitem__(..., x[...])
    return hopper.kernel(
      copy,
      name='too_much',
      out=jax.ShapeDtypeStruct(x.shape, x.dtype),
      grid=dict(block=1),
      scratch=scratch,
    )(x)

  with pytest.raises((gpu_compiler.CompileError, ValueError)):
    gpu_compiler.compile_for(too_much, jax.ShapeDtypeStruct((128,), 'float32'))
  with pytest.raises(ValueError, match="'h900' must be one of"):
    gpu_compiler.compile_for(jnp.sin, 1.0, chip='h900')
