"""Every case of every op becomes a program for CUDA, with a kernel or without.

Values and gradients, in the dtypes of the cases and with bfloat16 instead of
float32, which the kernels take.
"""

import functools
import importlib
import pathlib

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.common import dispatch

_ROOT = pathlib.Path(pallas_kernels.__file__).parent
_OPS = sorted(p.parent.name for p in _ROOT.glob('*/cases.py'))
_KERNELS = {p.parent.name for p in _ROOT.glob('*/pallas_gpu.py')}
# Calls an op that has one.
_CALLERS = {'ring_attention'}


def _narrow(x):
  return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


def _lowered(op, case):
  """The program's text: the result, and the gradients where there are some."""
  f = functools.partial(dispatch.dispatch, op, **case.get('kwargs', {}))
  f = case['wrap'](f) if 'wrap' in case else f
  diff = case.get('diff', ())

  def run(args):
    def of_diff(*values):
      full = list(args)
      for i, value in zip(diff, values, strict=True):
        full[i] = value
      return f(*full)

    if not diff:
      return f(*args)
    out, vjp = jax.vjp(of_diff, *(args[i] for i in diff))
    return out, vjp(jax.tree.map(jnp.ones_like, out))

  # A backward pass is traced after its dispatch, and not to be interpreted.
  uninterpreted = pltpu.force_tpu_interpret_mode(None)
  with dispatch.for_platform('cuda'), uninterpreted:
    traced = jax.jit(run).trace(case['args'])
  return traced.lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('narrow', [False, True], ids=['as_is', 'bfloat16'])
@pytest.mark.parametrize('op', _OPS)
def test_every_case_lowers(op, narrow):
  cases = importlib.import_module(f'pallas_kernels.{op}.cases').SMALL
  with_kernel = []
  for name, build in cases.items():
    case = build(jax.random.key(0))
    if narrow:
      case['args'] = jax.tree.map(_narrow, case['args'])
    text = _lowered(op, case)
    assert 'tpu_custom_call' not in text
    if 'mosaic_gpu' in text:
      with_kernel.append(name)
  if op not in _KERNELS | _CALLERS:
    assert not with_kernel
  elif narrow:
    assert len(with_kernel) >= len(cases) / 6, with_kernel
