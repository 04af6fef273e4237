"""RMSNorm against its equation in NumPy, on shapes that no block divides."""

import functools
import inspect

import hypothesis
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import pallas_tpu
from pallas_kernels.rms_norm import reference
from pallas_kernels.rms_norm import rms_norm

_IMPLEMENTATIONS = ('reference', 'xla', 'pallas_tpu', None)


@pytest.mark.parametrize('implementation', _IMPLEMENTATIONS)
@pytest.mark.parametrize('plus_one', [False, True])
def test_equation_4(implementation, plus_one):
  rng = np.random.default_rng(0)
  x, residual = (rng.normal(size=(3, 5, 24)).astype('float32') for _ in 'ab')
  scale = rng.normal(size=24).astype('float32')
  total = x + residual
  root = np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + 1e-3)
  expected = total / root * (scale + plus_one)
  norm, new = rms_norm(
    *map(jnp.asarray, (x, scale, residual)),
    epsilon=1e-3,
    plus_one=plus_one,
    implementation=implementation,
  )
  np.testing.assert_allclose(norm, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(new, total)
  if not plus_one:
    alone = rms_norm(
      jnp.asarray(total),
      jnp.asarray(scale),
      epsilon=1e-3,
      implementation=implementation,
    )
    np.testing.assert_allclose(alone, norm, rtol=1e-6, atol=1e-6)


@settings(max_examples=3, phases=[hypothesis.Phase.generate])
@given(
  num_rows=st.integers(1, 70),
  width=st.sampled_from([8, 128, 200, 384]),
  block_rows=st.sampled_from([16, 48]),
  with_residual=st.booleans(),
)
def test_gradients_on_rows_that_blocks_do_not_divide(
  num_rows, width, block_rows, with_residual
):
  keys = jax.random.split(jax.random.key(num_rows), 5)
  shape = (num_rows, width)
  x, residual, *cotangents = (jax.random.normal(k, shape) for k in keys[:4])
  scale = jax.random.normal(keys[4], (width,))
  args = (x, scale, residual) if with_residual else (x, scale)
  cotangents = tuple(cotangents) if with_residual else cotangents[0]

  @functools.partial(jax.jit, static_argnums=0)
  def run(f, *args):
    out, vjp = jax.vjp(f, *args)
    return out, vjp(cotangents)

  kernel = functools.partial(
    pallas_tpu.rms_norm, config=dict(block_rows=block_rows)
  )
  for a, e in zip(
    jax.tree.leaves(run(kernel, *args)),
    jax.tree.leaves(run(reference.rms_norm, *args)),
    strict=True,
  ):
    np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('implementation', ['xla', 'pallas_tpu'])
def test_inside_shard_map_the_gradient_of_scale_is_summed(implementation):
  mesh = jax.make_mesh(
    (4,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:4],
  )
  keys = jax.random.split(jax.random.key(0), 2)
  x, residual = (jax.random.normal(k, (8, 128)) for k in keys)
  scale = jnp.linspace(0.5, 2, 128)

  def loss(x, scale, residual, implementation=None):
    norm, total = rms_norm(x, scale, residual, implementation=implementation)
    return jnp.sum(norm**3) + jnp.sum(total**2)

  rows = jax.P('data')
  sharded = jax.shard_map(
    lambda *args: jax.lax.psum(loss(*args, implementation), 'data'),
    mesh=mesh,
    in_specs=(rows, jax.P(), rows),
    out_specs=jax.P(),
  )
  actual, expected = (
    jax.jit(jax.grad(f, (0, 1, 2)))(x, scale, residual) for f in (sharded, loss)
  )
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(scale=jnp.ones(7)), 'scale'),
    (dict(residual=jnp.ones((2, 9))), 'residual'),
    (dict(residual=jnp.ones((2, 8), jnp.bfloat16)), 'residual'),
  ],
)
def test_wrong_arguments(change, message):
  args = dict(x=jnp.ones((2, 8)), scale=jnp.ones(8)) | change
  with pytest.raises(ValueError, match=message):
    # The shape checks of the tests would come first.
    inspect.unwrap(rms_norm)(**args)
