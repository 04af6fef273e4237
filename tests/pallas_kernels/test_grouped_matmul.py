"""Rows meet their own group's matrix, whatever the groups and the mesh."""

import functools
import inspect

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.chip import Tpu
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul import pallas_tpu
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul import work_items


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


@settings(max_examples=10)
@given(
  sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
  rest=st.integers(0, 30),
  block=st.sampled_from([8, 16]),
  every_group=st.booleans(),
)
def test_work_items_cover_every_row_once(sizes, rest, block, every_group):
  num_rows = max(sum(sizes) + rest, 1)
  items = work_items.make(
    jnp.array(sizes), num_rows, block, every_group=every_group
  )
  group, tile, first_row, end_row, first, _, counts = map(
    np.asarray, items.arrays()
  )
  num_items = counts[1]
  assert num_items <= group.size
  owner = np.full(num_rows, -1)
  for i in range(num_items):
    start = tile[i] * block
    assert 0 <= start < num_rows
    rows = list(range(start + first_row[i], start + end_row[i]))
    assert (owner[rows] == -1).all()
    owner[rows] = group[i]
    assert (i == first[i]) == (i == 0 or group[i - 1] != group[i])
  used = np.repeat(np.arange(len(sizes)), sizes)
  np.testing.assert_array_equal(owner[: len(used)], used)
  assert (owner[len(used) :] == (-1 if every_group else len(sizes))).all()
  if every_group:
    visited = np.unique(group[:num_items])
    np.testing.assert_array_equal(visited, np.arange(len(sizes)))


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(module, lhs, rhs, sizes):
  static = {}
  if module is pallas_tpu:
    static = dict(config=dict(block_rows=16, part_rows=16))
  out, vjp = jax.vjp(
    lambda a, b: module.grouped_matmul(a, b, sizes, **static), lhs, rhs
  )
  return out, *vjp(
    jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
  )


@settings(max_examples=4)
@given(
  shares=st.lists(st.integers(0, 5), min_size=3, max_size=3),
  rest=st.integers(0, 2),
)
def test_tpu_kernels_at_any_group_sizes(shares, rest):
  num_rows = 40
  total = max(sum(shares) + rest, 1)
  sizes = jnp.array([s * num_rows // total for s in shares], jnp.int32)
  keys = jax.random.split(jax.random.key(0))
  lhs = jax.random.normal(keys[0], (num_rows, 24))
  rhs = jax.random.normal(keys[1], (3, 24, 40))
  actual, expected = (
    _value_and_gradients(module, lhs, rhs, sizes)
    for module in (pallas_tpu, reference)
  )
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'config, vmem_bytes',
  [
    (dict(chunk=128), 2**24),  # Three chunks.
    (dict(chunk=256), 2**24),  # The last one is narrower.
    (dict(chunk=128, block_n=256), 2**24),  # Two blocks of columns.
    (dict(chunk=128), 2_350_000),  # K in two blocks.
  ],
)
@pytest.mark.parametrize('transposed', [False, True])
def test_matrices_in_pieces(config, vmem_bytes, transposed, monkeypatch):
  tpu = Tpu('v5p', vmem_bytes)
  monkeypatch.setattr(pallas_tpu.chip_lib, 'current', lambda: tpu)
  keys = jax.random.split(jax.random.key(0))
  sizes = jnp.array([100, 30, 0, 120], jnp.int32)
  lhs = jax.random.normal(keys[0], (300, 256))
  rhs = jax.random.normal(keys[1], (4, 256, 384))
  expected = reference.grouped_matmul(lhs, rhs, sizes)
  if transposed:
    rhs = rhs.swapaxes(1, 2)
  out = pallas_tpu._multiply(
    lhs, rhs, sizes, None, jnp.dtype('float32'), transposed, config
  )
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_no_races():
  keys = jax.random.split(jax.random.key(0))
  sizes = jnp.array([100, 30, 0, 120], jnp.int32)
  lhs = jax.random.normal(keys[0], (300, 16))
  rhs = jax.random.normal(keys[1], (4, 16, 256))
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    out = pallas_tpu.grouped_matmul(lhs, rhs, sizes, config=dict(chunk=128))
  np.testing.assert_allclose(
    out, reference.grouped_matmul(lhs, rhs, sizes), rtol=1e-5, atol=1e-5
  )


def test_quantized_matrices_need_scales_and_are_constants():
  lhs, sizes = jnp.ones((4, 8)), jnp.array([3, 1], jnp.int32)
  rhs = jnp.ones((2, 8, 5), jnp.int8)
  with pytest.raises(ValueError, match='have scales'):
    grouped_matmul(lhs, rhs, sizes)
  with pytest.raises(ValueError, match='have scales'):
    grouped_matmul(lhs, rhs.astype('float32'), sizes, jnp.ones((2, 5)))
  with pytest.raises(ValueError, match='must be'):
    inspect.unwrap(grouped_matmul)(lhs, rhs, sizes, jnp.ones((2, 8)))
  loss = lambda a, s: grouped_matmul(a, rhs, sizes, s).sum()
  d_lhs, d_scales = jax.grad(loss, (0, 1))(lhs, jnp.full((2, 5), 0.5))
  np.testing.assert_array_equal(d_lhs, np.full((4, 8), 2.5))
  np.testing.assert_array_equal(d_scales, np.zeros((2, 5)))


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
