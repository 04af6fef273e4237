"""Quantised weights multiply as the matrix they stand for."""

import inspect

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import pallas_tpu
from pallas_kernels.quantized_matmul import quantize
from pallas_kernels.quantized_matmul import quantize_weights
from pallas_kernels.quantized_matmul import quantized_matmul


def _matrix(k, n, seed=0):
  return np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)


def _rms(a):
  return np.sqrt(np.mean(np.square(np.float32(a))))


def test_packed_words_hold_the_documented_rows():
  values = np.random.default_rng(0).integers(-8, 8, size=(256, 5))
  words = np.uint32(np.int64(quantize.pack(jnp.asarray(values))) & 0xFFFFFFFF)
  for block in range(2):
    for r in range(16):
      for p in range(4):
        word = words[16 * block + r]
        row = 128 * block + 32 * p + r
        np.testing.assert_array_equal(word >> 4 * p & 15, values[row] + 8)
        high = word >> 16 + 4 * p & 15
        np.testing.assert_array_equal(high, values[row + 16] + 8)
  np.testing.assert_array_equal(
    quantize.unpack(quantize.pack(jnp.asarray(values))), values
  )


@pytest.mark.parametrize(
  'dtype, group_size, step',
  [
    ('int8', None, 1 / 127),
    ('int4', 32, 1 / 7),
    ('int4', None, 1 / 7),
    ('float8_e4m3fn', None, 1 / 8),
    ('float8_e5m2', None, 1 / 4),
  ],
)
def test_rounding_is_off_by_at_most_half_a_step(dtype, group_size, step):
  matrix = _matrix(256, 6)
  matrix[:, 2] = 0
  values, scales = quantize_weights(
    jnp.asarray(matrix), dtype, group_size=group_size
  )
  if dtype == 'int4':
    values = quantize.unpack(values)
    scales = np.repeat(scales, group_size or 128, axis=0)
  size = group_size or (128 if dtype == 'int4' else 256)
  top = np.abs(matrix).reshape(-1, size, 6).max(1).repeat(size, axis=0)
  error = np.abs(np.float32(values) * scales - matrix)
  assert (error <= top * step / 2 + 1e-6).all()
  assert not np.isnan(error).any()


@settings(max_examples=6)
@given(
  m=st.integers(1, 40),
  k=st.integers(1, 80),
  n=st.integers(1, 300),
  dtype=st.sampled_from(['int8', 'float8_e4m3fn', 'float8_e5m2']),
)
def test_eight_bits_of_any_shape(m, k, n, dtype):
  values, scales = quantize_weights(jnp.asarray(_matrix(k, n)), dtype)
  x = _matrix(m, k, 1)
  out = pallas_tpu.quantized_matmul(
    jnp.asarray(x), values, scales, config=dict(block_rows=32, block_n=128)
  )
  expected = np.float64(x) @ (np.float64(values) * np.float64(scales))
  assert _rms(out - expected) <= 1e-5 * _rms(expected)


@pytest.mark.parametrize('group_size', quantize.GROUP_SIZES)
@pytest.mark.parametrize('m', [4, 130])
def test_four_bits_with_zero_points(group_size, m):
  """Few rows are multiplied in another way than many."""
  values, scales = quantize_weights(
    jnp.asarray(_matrix(256, 256)), 'int4', group_size=group_size
  )
  zeros = np.random.default_rng(2).integers(-8, 8, size=scales.shape)
  x = jnp.asarray(_matrix(m, 256, 1), jnp.bfloat16)
  matrix = np.float64(quantize.unpack(values))
  matrix -= np.repeat(zeros, group_size, axis=0)
  matrix *= np.repeat(scales, group_size, axis=0)
  expected = np.float64(x) @ matrix
  out = pallas_tpu.quantized_matmul(
    x,
    values,
    scales,
    jnp.asarray(zeros, jnp.int8),
    preferred_element_type=jnp.float32,
    config=dict(block_n=256, piece=128),
  )
  # Scaled before they are rounded to bfloat16, or only after the product.
  assert _rms(out - expected) <= (2e-3 if m > 128 else 1e-5) * _rms(expected)


@pytest.mark.parametrize('chip', ['v5e', 'tpu7x'])
def test_int8_tokens_have_scales_of_their_own(chip, monkeypatch):
  """With and without a matrix unit for integers."""
  tpu = pallas_tpu.chip_lib.Tpu(chip, 2**24)
  monkeypatch.setattr(pallas_tpu.chip_lib, 'current', lambda: tpu)
  values, scales = quantize_weights(jnp.asarray(_matrix(96, 64)))
  x = _matrix(5, 96, 1) * np.array([1e-3, 1, 10, 0, 1e3])[:, None]
  step = np.abs(x).max(1, keepdims=True) / 127
  rounded = np.round(x / np.where(step > 0, step, 1))
  expected = rounded @ np.float64(values) * step * np.float64(scales)
  out = pallas_tpu.quantized_matmul(
    jnp.asarray(x, jnp.float32), values, scales, activations='int8'
  )
  for a, e in zip(out, expected, strict=True):
    assert _rms(a - e) <= 1e-4 * _rms(e)


def test_leading_dimensions_and_no_races():
  values, scales = quantize_weights(jnp.asarray(_matrix(32, 200)))
  x = jnp.asarray(_matrix(6, 32, 1)).reshape(2, 3, 32)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    out = quantized_matmul(x, values, scales, implementation='pallas_tpu')
  expected = quantized_matmul(x, values, scales, implementation='reference')
  assert out.shape == (2, 3, 200)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(weights=jnp.zeros((7, 4), jnp.int8)), 'does not fit'),
    (dict(weights=jnp.zeros((128, 4))), 'not int32'),
    (dict(weights=jnp.zeros((128, 4), jnp.int32)), 'does not fit'),
    (dict(scales=jnp.ones((4, 4))), 'not one of'),
    (dict(zero_points=jnp.ones((1, 4))), 'others none'),
    (dict(activations='float8_e4m3fn'), 'int8 goes with int8'),
  ],
)
def test_wrong_arguments(kwargs, message):
  given = dict(
    x=jnp.ones((2, 128)),
    weights=jnp.zeros((128, 4), jnp.int8),
    scales=jnp.ones((4,)),
  )
  with pytest.raises(ValueError, match=message):
    # The shape checks of the tests would come first.
    inspect.unwrap(quantized_matmul)(**(given | kwargs))


@pytest.mark.parametrize(
  'shape, dtype, group_size, message',
  [
    ((128, 4), 'int4', 16, 'groups of'),
    ((128, 4), 'int8', 32, 'groups of'),
    ((100, 4), 'int4', None, 'multiple of'),
    ((128, 4), 'int16', None, 'known'),
  ],
)
def test_wrong_weights(shape, dtype, group_size, message):
  with pytest.raises(ValueError, match=message):
    quantize_weights(jax.numpy.ones(shape), dtype, group_size=group_size)
