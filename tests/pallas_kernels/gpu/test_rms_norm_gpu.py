"""The Hopper kernels of rms_norm, interpreted, and lowered for CUDA."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import hopper
from pallas_kernels.rms_norm import cases
from pallas_kernels.rms_norm import pallas_gpu
from pallas_kernels.rms_norm import reference

_RMS_TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2, 'float16': 2e-3}

interpreted = pytest.mark.skipif(
  not hopper.can_interpret(),
  reason='this JAX has no interpreter of GPU kernels',
)


def _interpret(f, *args, races=False):
  with hopper.interpret(detect_races=races):
    return jax.block_until_ready(f(*args))


def _value_and_vjp(f, case):
  diff = case['diff']

  def of_diff(*values):
    args = list(case['args'])
    for i, value in zip(diff, values, strict=True):
      args[i] = value
    return f(*args, **case['kwargs'])

  out, vjp = jax.vjp(of_diff, *(case['args'][i] for i in diff))
  leaves, tree = jax.tree.flatten(out)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  dy = [
    jax.random.normal(k, leaf.shape, leaf.dtype)
    for k, leaf in zip(keys, leaves, strict=True)
  ]
  return out, vjp(tree.unflatten(dy))


def _assert_equal_reference(case, races=False, **kwargs):
  f = functools.partial(pallas_gpu.rms_norm, **kwargs)
  actual = _interpret(lambda: _value_and_vjp(f, case), races=races)
  expected = _value_and_vjp(reference.rms_norm, case)
  tolerance = _RMS_TOLERANCE[case['args'][0].dtype.name]
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.shape == e.shape and a.dtype == e.dtype
    a, e = np.float32(a), np.float32(e)
    rms = np.sqrt(np.mean(np.square(e)))
    assert np.sqrt(np.mean(np.square(a - e))) <= tolerance * rms
    assert np.abs(a - e).max() <= 10 * tolerance * np.abs(e).max()


def _case(shape, dtype='float32', residual=True, **kwargs):
  return cases.SMALL['plain'].func(
    jax.random.key(0), shape=shape, dtype=dtype, residual=residual, **kwargs
  )


@interpreted
@pytest.mark.parametrize('name', cases.SMALL)
def test_equals_the_reference(name):
  _assert_equal_reference(cases.SMALL[name](jax.random.key(0)), name == 'bf16')


@interpreted
@pytest.mark.parametrize(
  'shape, stages',
  [((300, 40), 2), ((67, 264), 3), ((42, 512), 2), ((1, 8), 2)],
  ids=str,
)
def test_every_tile_comes_once(monkeypatch, shape, stages):
  # Three blocks: of several tiles each, more of them than stages, or of none.
  gpu = hopper.Gpu('h200', num_sms=3)
  monkeypatch.setattr(hopper, 'current', lambda: gpu)
  config = dict(stages=stages, blocks_per_sm=1)
  _assert_equal_reference(_case(shape), stages == 2, config=config)


@interpreted
def test_a_long_row_in_pieces():
  _assert_equal_reference(_case((4, 6144), 'bfloat16'))


@interpreted
def test_padding_is_no_part_of_the_mean():
  x = jnp.full((4, 33), 3.0)
  out = _interpret(
    lambda: pallas_gpu.rms_norm(x, jnp.ones(33), epsilon=0.0), races=True
  )
  np.testing.assert_allclose(out, jnp.ones((4, 33)), rtol=1e-6)


def _lower(f, *args):
  # Not by the interpreter of TPU kernels that tests turn on.
  with pltpu.force_tpu_interpret_mode(None):
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',))
  return lowered.as_text()


@pytest.mark.parametrize('name', [*cases.SMALL, *cases.TPU])
def test_lowers_for_cuda(name):
  build = cases.TPU.get(name) or functools.partial(
    cases.SMALL[name], jax.random.key(0)
  )
  case = build()
  f = functools.partial(pallas_gpu.rms_norm, **case['kwargs'])

  def loss(*args):
    return sum(a.astype(jnp.float32).sum() for a in jax.tree.leaves(f(*args)))

  text = _lower(jax.value_and_grad(loss, case['diff']), *case['args'])
  assert text.count('custom_call @mosaic_gpu') == 2


def test_declines_what_does_not_fit():
  with pytest.raises(NotImplementedError, match='int32'):
    pallas_gpu.rms_norm(jnp.ones((4, 64), jnp.int32), jnp.ones(64))
  with pytest.raises(NotImplementedError, match='8192'):
    x, scale = jnp.ones((1, 9000)), jnp.ones(9000)
    loss = lambda scale: pallas_gpu.rms_norm(x, scale).sum()
    jax.eval_shape(jax.grad(loss), scale)
