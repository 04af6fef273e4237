"""Copies on the host are whole, whatever becomes of the originals."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from jaxtrain.checkpoints import staging


def _sharded(value):
  mesh = jax.make_mesh((8,), ('x',))
  return jax.device_put(value, NamedSharding(mesh, P('x')))


def test_a_donated_array_does_not_tear_its_copy():
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = _sharded(np.zeros(1 << 22, np.float32))
  for i in range(5):
    copy = staging.to_host({'x': x})['x']
    x = add(x)
    np.testing.assert_array_equal(np.asarray(copy), i)


def test_keeps_structure_shards_and_what_is_no_array():
  state = {
    'a': _sharded(np.arange(16.0)),
    'key': jax.random.key(3),
    'n': np.arange(3),
  }
  copy = staging.to_host(state)
  assert copy['a'].sharding.memory_kind == 'pinned_host'
  assert copy['a'].sharding.spec == P('x')
  np.testing.assert_array_equal(
    np.asarray(copy['key']), jax.random.key_data(state['key'])
  )
  assert copy['n'] is state['n']
