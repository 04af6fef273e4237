"""A bit that differs is seen, where there is another copy of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import fingerprint
from jaxtrain.sharding import make_mesh

_SPECS = dict(
  matrix=jax.P('fsdp', 'tensor'),
  vector=jax.P(),
  half=jax.P('tensor'),
  flags=jax.P(),
)


def _tree(mesh):
  rng = np.random.default_rng(0)
  values = dict(
    matrix=rng.normal(size=(8, 6)).astype(np.float32),
    vector=np.arange(5, dtype=np.int32),
    half=jnp.asarray(rng.normal(size=4), jnp.bfloat16),
    flags=np.array([True, False]),
  )
  return {
    name: jax.device_put(v, jax.sharding.NamedSharding(mesh, _SPECS[name]))
    for name, v in values.items()
  }


def _expected(tree, device):
  """The docstring of `_checksum`, in integers without end."""
  total, prime = 0, 2654435761
  for i, x in enumerate(jax.tree.leaves(tree)):
    (shard,) = [s.data for s in x.addressable_shards if s.device == device]
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    words = np.asarray(shard).view(kinds[x.dtype.itemsize]).ravel()
    checksum = sum(int(w) * (2 * j + 1) * prime for j, w in enumerate(words))
    total = (total * prime + checksum + i) % 2**32
  return total


def _flip(x, device, bit):
  """`x` with one bit of one device's copy turned over."""
  shards = []
  for s in x.addressable_shards:
    data = np.array(s.data)
    if s.device == device:
      data.view(np.uint8).ravel()[bit // 8] ^= 1 << bit % 8
    shards.append(jax.device_put(data, s.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def test_equal_to_its_definition():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  tree = _tree(mesh)
  sums = fingerprint.make_fingerprint(tree, mesh)(tree)
  assert sums.shape == (8,) and sums.dtype == jnp.uint32
  for shard in sums.addressable_shards:
    assert int(shard.data[0]) == _expected(tree, shard.device)


def test_groups_hold_the_same():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  tree = _tree(mesh)
  groups = fingerprint.groups(tree, mesh)
  grid = mesh.devices.reshape(2, 2, 2)
  assert len(set(groups.values())) == 4
  for fsdp in range(2):
    for tensor in range(2):
      first, second = grid[:, fsdp, tensor]
      assert groups[first.id] == groups[second.id]
  sums = fingerprint.by_group(
    fingerprint.make_fingerprint(tree, mesh)(tree), groups
  )
  assert {len(v) for v in sums.values()} == {1}
  assert len({v[0] for v in sums.values()}) == 4


@pytest.mark.parametrize(
  'leaf, bit', [('matrix', 0), ('matrix', 31), ('half', 9), ('flags', 8)]
)
def test_one_bit_on_one_device_is_seen(leaf, bit):
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  tree = _tree(mesh)
  function = fingerprint.make_fingerprint(tree, mesh)
  groups = fingerprint.groups(tree, mesh)
  bad = mesh.devices.flat[5]
  spoilt = {**tree, leaf: _flip(tree[leaf], bad, bit)}
  before, after = (
    fingerprint.by_group(function(t), groups) for t in (tree, spoilt)
  )
  assert {g for g in after if len(after[g]) > 1} == {groups[bad.id]}
  assert set(before[groups[bad.id]]) < set(after[groups[bad.id]])


def test_without_a_copy_nothing_is_compared():
  mesh = make_mesh('fsdp=8')
  x = jax.device_put(
    np.arange(8.0), jax.sharding.NamedSharding(mesh, jax.P('fsdp'))
  )
  assert len(set(fingerprint.groups(x, mesh).values())) == 8


def test_no_device_waits_for_another():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  tree = _tree(mesh)
  text = (
    fingerprint.make_fingerprint(tree, mesh).lower(tree).compile().as_text()
  )
  for collective in ('all-reduce', 'all-gather', 'collective-permute'):
    assert collective not in text
