"""The hand-written backward is the derivative of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.projection import project


def _arrays(*shapes):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
  'x_shape, kernel_shape, num_in, spec',
  [
    ((2, 3, 4), (4, 9), 1, 'btd,df->btf'),
    ((2, 3, 9), (9, 4), 1, 'btd,df->btf'),
    ((2, 3, 4), (4, 5, 6), 1, 'btd,dnh->btnh'),
    ((2, 3, 5, 6), (5, 6, 4), 2, 'btnh,nhd->btd'),
    ((7, 4), (4, 3), 1, 'td,df->tf'),
  ],
)
def test_value_and_gradients_equal_einsum(x_shape, kernel_shape, num_in, spec):
  x, kernel = _arrays(x_shape, kernel_shape)

  @jax.jit
  def run(x, kernel):
    y, vjp = jax.vjp(lambda x, k: project(x, k, num_in), x, kernel)
    expected, einsum_vjp = jax.vjp(
      lambda x, k: jnp.einsum(spec, x, k), x, kernel
    )
    d_y = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return (y, *vjp(d_y)), (expected, *einsum_vjp(d_y))

  for actual, expected in zip(*run(x, kernel), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
  x, kernel = _arrays((3, 4), (4, 2))
  loss = lambda k: jnp.sum(jnp.tanh(project(x, k)) ** 2)
  plain = lambda k: jnp.sum(jnp.tanh(x @ k) ** 2)
  tangent = jnp.ones_like(kernel)

  @jax.jit
  def run(kernel):
    # Forward mode is closed to functions with a backward of their own.
    along = lambda f: lambda k: jnp.vdot(jax.grad(f)(k), tangent)
    return [jax.grad(along(f))(kernel) for f in (loss, plain)]

  np.testing.assert_allclose(*run(kernel), rtol=1e-4, atol=1e-5)


def test_weight_gradient_is_summed_inside_shard_map():
  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, kernel = _arrays((8, 4), (4, 2))
  sharded = jax.shard_map(
    project,
    mesh=mesh,
    in_specs=(jax.P('data'), jax.P()),
    out_specs=jax.P('data'),
  )
  run = lambda f: jax.jit(jax.grad(lambda k: jnp.sum(f(x, k) ** 2)))(kernel)
  np.testing.assert_allclose(run(sharded), run(jnp.matmul), rtol=1e-5)
