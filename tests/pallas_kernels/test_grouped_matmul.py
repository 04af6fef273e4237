"""Rows meet their own group's matrix, whatever the groups and the mesh."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul


def _loop(lhs, rhs, sizes):
  out = np.zeros((lhs.shape[0], rhs.shape[2]), np.float32)
  start = 0
  for matrix, size in zip(rhs, sizes, strict=True):
    out[start : start + size] = lhs[start : start + size] @ matrix
    start += size
  return out


@pytest.mark.parametrize('num_rows', [1, 7, 64, 300])
@pytest.mark.parametrize('num_groups', [1, 5])
def test_equals_a_loop_over_groups(num_rows, num_groups):
  rng = np.random.default_rng(num_rows + num_groups)
  lhs = rng.normal(size=(num_rows, 6)).astype(np.float32)
  rhs = rng.normal(size=(num_groups, 6, 9)).astype(np.float32)
  run = jax.jit(grouped_matmul)
  for _ in range(5):
    # The last share of the rows belongs to no group.
    shares = rng.dirichlet(np.full(num_groups + 1, 0.3))
    sizes = np.floor(shares * num_rows).astype(np.int32)[:-1]
    np.testing.assert_allclose(
      run(lhs, rhs, sizes), _loop(lhs, rhs, sizes), atol=1e-5
    )


def test_empty_inputs():
  sizes = jnp.zeros((2,), jnp.int32)
  assert grouped_matmul(jnp.ones((0, 3)), jnp.ones((2, 3, 4)), sizes).shape == (
    0,
    4,
  )
  out = grouped_matmul(jnp.ones((5, 3)), jnp.ones((2, 3, 0)), sizes)
  assert out.shape == (5, 0)


def test_spilled_rows_do_not_poison_gradients():
  # Rows past the last group are read by its last block; NaNs in them must stay.
  lhs = jnp.ones((10, 4)).at[3:].set(jnp.nan)
  rhs, sizes = jnp.ones((2, 4, 4)), jnp.array([2, 1], jnp.int32)

  @jax.jit
  def run(lhs, rhs):
    out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes), lhs, rhs)
    return out, *vjp(jnp.ones_like(out).at[3:].set(jnp.nan))

  out, d_lhs, d_rhs = run(lhs, rhs)
  np.testing.assert_array_equal(out, [[4.0] * 4] * 3 + [[0.0] * 4] * 7)
  np.testing.assert_array_equal(d_lhs, [[4.0] * 4] * 3 + [[0.0] * 4] * 7)
  np.testing.assert_array_equal(d_rhs[0], np.full((4, 4), 2.0))
  np.testing.assert_array_equal(d_rhs[1], np.full((4, 4), 1.0))


def test_inside_shard_map_gradients_are_summed_over_shards():
  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  keys = jax.random.split(jax.random.key(0), 2)
  lhs = jax.random.normal(keys[0], (32, 8))
  rhs = jax.random.normal(keys[1], (3, 8, 5))
  sizes = jnp.array([[4, 1, 3], [8, 0, 0], [0, 8, 0], [1, 1, 1]], jnp.int32)

  def sharded(lhs, rhs):
    local = jax.shard_map(
      lambda a, b, s: grouped_matmul(a, b, s[0]),
      mesh=mesh,
      in_specs=(jax.P('data'), jax.P(), jax.P('data')),
      out_specs=jax.P('data'),
    )
    return jnp.sum(local(lhs, rhs, sizes) ** 2)

  def whole(lhs, rhs):
    parts = [
      grouped_matmul(a, rhs, s, implementation='reference')
      for a, s in zip(jnp.split(lhs, 4), sizes, strict=True)
    ]
    return jnp.sum(jnp.concatenate(parts) ** 2)

  actual, expected = (
    jax.jit(jax.value_and_grad(f, (0, 1)))(lhs, rhs) for f in (sharded, whole)
  )
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_visits_only_blocks_that_exist():
  # FLOPs follow the rows, not the number of groups.
  lhs, sizes = jnp.ones((256, 16)), jnp.array([256] + [0] * 63, jnp.int32)
  jaxpr = jax.make_jaxpr(grouped_matmul)(lhs, jnp.ones((64, 16, 8)), sizes)
  largest = max(v.aval.size for e in jaxpr.eqns for v in e.outvars)
  assert largest <= 2 * 256 * 16


@pytest.mark.parametrize(
  'lhs, rhs, sizes, message',
  [
    ((4, 3), (2, 5, 6), np.int32([1, 1]), 'disagree'),
    ((4, 3), (2, 3, 6), np.int32([1, 1, 1]), 'disagree'),
    ((4, 3, 1), (2, 3, 6), np.int32([1, 1]), 'takes lhs'),
    ((4, 3), (2, 3, 6), np.float32([1, 1]), 'not integers'),
  ],
)
def test_wrong_arguments(lhs, rhs, sizes, message):
  with pytest.raises(ValueError, match=message):
    # The shape checks of the tests would come first.
    inspect.unwrap(grouped_matmul)(jnp.ones(lhs), jnp.ones(rhs), sizes)
