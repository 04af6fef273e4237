"""Blocks give what whole arrays give, and write nothing of a leaf's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.optimizers import _sweep
from jaxtrain.optimizers.vrgd import vrgd

_STAGES = [
  {'r': lambda x: x['r'] / 2 + jnp.abs(x['g'])},
  {
    'm': lambda x: x['m'] * 0.9 + x['r'] * x['g'],
    'v': lambda x: x['v'] * 0.8 + x['g'] ** 2,
  },
]
_SUMS = {
  'u': lambda x: jnp.square(x['m'] / (1 + jnp.abs(x['v']))).astype(jnp.float32),
  'g': lambda x: x['g'].astype(jnp.float32),
}


@pytest.fixture
def tiny_blocks(monkeypatch):
  monkeypatch.setattr(_sweep, '_BLOCK', 16)
  monkeypatch.setattr(_sweep, '_SMALL', 32)


def _arrays(shape, dtype='float32'):
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=shape), dtype)
  return {k: draw() for k in 'rmv'}, {'g': draw()}


def _assert_close(found, expected, rtol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=rtol, atol=1e-6
    ),
    found,
    expected,
  )


@pytest.mark.parametrize(
  ['shape', 'first', 'is_in_blocks'],
  [
    ((32, 6), 0, True),
    ((3, 16, 2, 4), 1, True),
    ((3, 18, 5), 1, False),  # Not of blocks that have four parts.
    ((64,), 0, False),
    ((), 0, False),
  ],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_blocks_are_as_the_whole(
  tiny_blocks, shape, first, is_in_blocks, dtype
):
  kept, given = _arrays(shape, dtype)
  assert (_sweep._rows(kept, first) is not None) == is_in_blocks
  sweep = lambda k, g: _sweep.sweep(_STAGES, _SUMS, k, g, first)
  found = jax.jit(sweep)(kept, given)
  expected = _sweep._plain(_STAGES, _SUMS, kept, given, first)
  _assert_close(found, expected, 1e-5 if dtype == 'float32' else 2e-2)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
  assert {x.dtype.name for x in found[0].values()} == {dtype}


def test_blocks_of_sharded_arrays(tiny_blocks):
  mesh = jax.make_mesh(
    (2, 4), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  sharding = jax.NamedSharding(mesh, jax.P(None, 'fsdp', 'tensor'))
  arrays = _arrays((2, 32, 8))
  sweep = jax.jit(lambda k, g: _sweep.sweep(_STAGES, _SUMS, k, g, 1))
  found = sweep(*jax.device_put(arrays, sharding))
  _assert_close(found, sweep(*arrays))
  for x in found[0].values():
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_blocks_inside_shard_map(tiny_blocks):
  mesh = jax.make_mesh((2,), ('data',))
  arrays = _arrays((32, 6))
  sweep = lambda k, g: _sweep.sweep(_STAGES, _SUMS, k, g, 0)
  mapped = jax.shard_map(sweep, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
  _assert_close(jax.jit(mapped)(*arrays), sweep(*arrays))


@pytest.mark.parametrize('base', ['lamb', 'adam'])
def test_nothing_of_a_leafs_size_is_written_besides(base):
  shape = (1024, 1024)
  params = {'w': jnp.ones(shape)}
  tx = vrgd(1e-2, base)

  def step(params, state, grads, square):
    updates, state = tx.update(grads, state, params, mean_square=square)
    return jax.tree.map(jnp.add, params, updates), state

  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
    params, tx.init(params), params, params
  )
  temporary = lowered.compile().memory_analysis().temp_size_in_bytes
  assert temporary < 4 * 1024 * 1024 / 4


def test_three_groups_are_refused():
  kept, given = _arrays((4, 4))
  with pytest.raises(ValueError, match='3 groups of stages, two are allowed'):
    _sweep.sweep([{}] * 3, {}, kept, given, 0)


@pytest.mark.parametrize(
  ['platform', 'num_loops'], [('cpu', 1), ('tpu', 0), ('cuda', 0)]
)
def test_only_cpus_have_a_loop(tiny_blocks, platform, num_loops):
  sweep = jax.jit(lambda k, g: _sweep.sweep(_STAGES, _SUMS, k, g, 0))
  traced = sweep.trace(*_arrays((32, 6)))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('stablehlo.while') == num_loops
