"""Rotary embedding against its equation in NumPy, on odd lengths."""

import inspect

import hypothesis
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope import pallas_tpu
from pallas_kernels.rope import rope


@pytest.mark.parametrize('implementation', ['reference', 'xla', 'pallas_tpu'])
def test_equation_34(implementation):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 128))
  angle = np.arange(5)[:, None] * 10000.0 ** (-np.arange(64) / 64)
  a, b = np.split(np.asarray(x), 2, axis=-1)
  s, c = (f(angle)[None, :, None].astype('float32') for f in (np.sin, np.cos))
  expected = np.concatenate([a * c - b * s, b * c + a * s], -1)
  actual = rope(
    x,
    jnp.asarray(s[:, :, 0]),
    jnp.asarray(c[:, :, 0]),
    implementation=implementation,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=3, phases=[hypothesis.Phase.generate])
@given(
  length=st.integers(1, 100),
  num_heads=st.integers(1, 3),
  block_rows=st.sampled_from([32, 64]),
)
def test_rotated_back_it_is_what_it_was(length, num_heads, block_rows):
  keys = jax.random.split(jax.random.key(length))
  x = jax.random.normal(keys[0], (2, length, num_heads, 128))
  angle = jax.random.uniform(keys[1], (2, length, 64), maxval=6.0)
  sin, cos = jnp.sin(angle), jnp.cos(angle)

  @jax.jit
  def there_and_back(x):
    config = dict(block_rows=block_rows)
    y, vjp = jax.vjp(lambda x: pallas_tpu.rope(x, sin, cos, config=config), x)
    return vjp(y)[0]

  np.testing.assert_allclose(there_and_back(x), x, rtol=1e-5, atol=1e-5)


def test_wrong_arguments():
  x, table = jnp.ones((2, 3, 1, 128)), jnp.ones((2, 3, 128))
  with pytest.raises(ValueError, match='sin'):
    # The shape checks of the tests would come first.
    inspect.unwrap(rope)(x, table, table)
