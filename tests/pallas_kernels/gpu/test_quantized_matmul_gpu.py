"""The Hopper kernels of quantized_matmul, in the interpreter of GPU kernels."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import hopper
from pallas_kernels.quantized_matmul import cases
from pallas_kernels.quantized_matmul import pallas_gpu
from pallas_kernels.quantized_matmul import pallas_gpu_widened
from pallas_kernels.quantized_matmul import quantize
from pallas_kernels.quantized_matmul import reference

interpreted = pytest.mark.skipif(
  not hopper.can_interpret(),
  reason='this JAX has no interpreter of GPU kernels',
)
_TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2}
# Few blocks share the tiles, so that each has several.
_GPU = hopper.Gpu('h200', num_sms=4)


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch):
  monkeypatch.setattr(hopper, 'current', lambda: _GPU)


def _run(*args, on_race='raise', **kwargs):
  f = functools.partial(pallas_gpu.quantized_matmul, **kwargs)
  with hopper.interpret(detect_races=True, on_race=on_race):
    return jax.jit(f)(*args)


def _error(actual, expected):
  actual, expected = np.float32(actual), np.float32(expected)
  assert actual.shape == expected.shape
  return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def _case(m, k, n, weights='int8', dtype='bfloat16', group=None, zeros=False):
  keys = jax.random.split(jax.random.key(m + k + n), 3)
  x = jax.random.normal(keys[0], (m, k), dtype)
  # Rows and columns of unlike sizes, so that no scale stands for another.
  x *= jnp.exp(jax.random.normal(keys[2], (m, 1))).astype(dtype)
  matrix = jax.random.normal(keys[1], (k, n))
  matrix *= jnp.exp(jax.random.normal(keys[2], (k, 1)))
  matrix *= jnp.exp(jax.random.normal(keys[0], (1, n)))
  values, scales = quantize.quantize_weights(matrix, weights, group_size=group)
  zero_points = None
  if zeros:
    zero_points = jax.random.randint(keys[2], scales.shape, -8, 8, jnp.int8)
  return x, values, scales, zero_points


def _accepted():
  found = []
  for name, build in cases.SMALL.items():
    case = build(jax.random.key(0))
    rounded = case['kwargs'].get('activations') is not None
    if case['args'][0].dtype == jnp.bfloat16 or rounded:
      found.append(pytest.param(case, id=name))
  return found


@interpreted
@pytest.mark.parametrize('case', _accepted())
def test_small_cases(case):
  expected = reference.quantized_matmul(*case['args'], **case['kwargs'])
  actual = _run(*case['args'], **case['kwargs'])
  assert actual.dtype == expected.dtype
  tolerance = _TOLERANCE[case['args'][0].dtype.name]
  assert _error(actual, expected) < tolerance


@interpreted
@pytest.mark.parametrize(
  'shape,config',
  [
    # Two rows of tiles; the last of rows, of columns and of K are cut off.
    (
      dict(m=75, k=264, n=200),
      dict(block_rows=64, depth=128, slots=2, peers=2, across=2),
    ),
    # Three steps among two blocks.
    (dict(m=9, k=640, n=64), dict(depth=256, splits=2, slots=2)),
    # Four steps among three blocks: one has none.
    (
      dict(m=9, k=512, n=320),
      dict(depth=128, splits=3, slots=6, peers=2, across=4),
    ),
    (
      dict(m=9, k=640, n=200, weights='int4'),
      dict(depth=128, splits=2, slots=2),
    ),
    (
      dict(m=75, k=384, n=320, weights='int4', group=32, zeros=True),
      dict(block_rows=64, depth=128, slots=2, peers=2, across=2),
    ),
    (
      dict(m=9, k=384, n=72, weights='int4', group=64, zeros=True),
      dict(depth=256, slots=2),
    ),
  ],
)
def test_widened(shape, config):
  args = _case(**shape)
  # A float32 result shows more than rounding of the result would.
  static = dict(preferred_element_type=jnp.float32)
  expected = reference.quantized_matmul(*args, **static)
  actual = _run(*args, **static, config=config)
  assert _error(actual, expected) < _TOLERANCE['float32']


@interpreted
@pytest.mark.parametrize(
  'weights,activations,dtype',
  [
    ('int8', 'int8', 'float32'),
    ('float8_e4m3fn', 'float8_e4m3fn', 'float32'),
    ('float8_e5m2', 'float8_e4m3fn', 'bfloat16'),
  ],
)
def test_few_rows_of_rounded_activations(weights, activations, dtype):
  args = _case(5, 200, 130, weights=weights, dtype=dtype)
  static = dict(activations=activations, preferred_element_type=jnp.float32)
  expected = reference.quantized_matmul(*args, **static)
  assert _error(_run(*args, **static), expected) < _TOLERANCE['float32']


@interpreted
@pytest.mark.parametrize(
  'weights,slots,across,peers',
  [('int8', 2, 1, 1), ('int8', 4, 2, 2), ('float8_e4m3fn', 3, 2, 2)],
)
def test_narrow(monkeypatch, weights, slots, across, peers):
  monkeypatch.setattr(pallas_gpu, '_MANY_ROWS', 1)
  args = _case(300, 380, 270, weights=weights)
  static = dict(activations=weights, preferred_element_type=jnp.float32)
  expected = reference.quantized_matmul(*args, **static)
  config = dict(slots=slots, across=across, peers=peers)
  actual = _run(*args, **static, config=config)
  # The interpreter's sums of float8 are as exact as float32.
  assert _error(actual, expected) < _TOLERANCE['float32']


@interpreted
def test_broken_scales_are_seen(monkeypatch):
  load = hopper.load
  monkeypatch.setattr(hopper, 'load', lambda *args: jnp.ones_like(load(*args)))
  args = _case(9, 256, 128, weights='int4')
  expected = reference.quantized_matmul(*args)
  assert not _error(_run(*args), expected) < _TOLERANCE['bfloat16']


@interpreted
def test_a_slot_that_is_filled_too_early_is_seen(monkeypatch, caplog):
  # Readers of a slot no longer say that they are done before copies go there.
  monkeypatch.setattr(pallas_gpu_widened, '_release', plgpu.barrier_arrive)
  args = _case(9, 512, 128, weights='int4')
  config = dict(depth=128, slots=2, splits=1)
  jax.block_until_ready(_run(*args, config=config, on_race='warn'))
  assert 'RACE DETECTED' in caplog.text


def _lowered(*args, **kwargs):
  f = functools.partial(pallas_gpu.quantized_matmul, **kwargs)
  with pltpu.force_tpu_interpret_mode(None):
    traced = jax.jit(f).trace(*args)
    return traced.lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('case', _accepted())
def test_lowers_for_cuda(case):
  assert 'mosaic_gpu' in _lowered(*case['args'], **case['kwargs'])


@pytest.mark.parametrize('scheme', ['w8a16', 'w8a8', 'w4a16'])
def test_many_rows_lower_for_cuda(scheme):
  shapes = jax.eval_shape(
    lambda: cases.MODEL[f'{scheme}_prefill'](jax.random.key(0))['args']
  )
  activations = 'int8' if scheme == 'w8a8' else None
  text = _lowered(*shapes, activations=activations)
  kind = 'narrow' if scheme == 'w8a8' else 'widened'
  assert f'quantized_matmul_{kind}' in text


def test_splits_fill_the_multiprocessors():
  gpu = hopper.Gpu('h200')
  splits = functools.partial(pallas_gpu._splits, gpu)
  assert splits((32, 4096, 14336), jnp.int8) == 1
  assert splits((1, 14336, 4096), jnp.int8) == 4
  # A result for each split would cost more than idle multiprocessors.
  assert splits((128, 256, 4096), jnp.int8) == 1
  assert splits((512, 14336, 4096), jnp.int8) == 1


@pytest.mark.parametrize(
  'dtype,static',
  [
    ('float32', {}),
    ('float16', {}),
    ('bfloat16', dict(preferred_element_type=jnp.float16)),
  ],
)
def test_declines(dtype, static):
  x, *rest = _case(4, 128, 64)
  with pytest.raises(NotImplementedError, match='float'):
    pallas_gpu.quantized_matmul(x.astype(dtype), *rest, **static)
