"""Heads on a mesh (https://arxiv.org/abs/2309.06180, section 4.6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.attention import base
from jaxserve.attention.paged import paged
from jaxserve.cache import pages as pages_lib
from jaxtrain.models.attention import LayerSpec
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import unsharded


@pytest.mark.parametrize('shards, stored', [(2, 2), (4, 4), (8, 8)])
def test_shards_hold_whole_heads(shards, stored):
  n, k, h, t, z = 8, 2, 4, 6, 4
  keys = jax.random.split(jax.random.key(0), 3)
  q, key, value = (
    jax.random.normal(x, (1, t, heads, h))
    for x, heads in zip(keys, (n, k, k), strict=True)
  )
  batch = base.Batch(
    tokens=jnp.zeros(t, jnp.int32),
    positions=jnp.arange(t),
    slot=jnp.arange(t) + z,
    query_start=jnp.array([0, t]),
    kv_len=jnp.array([t]),
    page_table=jnp.array([[1, 2]]),
  )
  layer = LayerSpec(jnp.int32(0), None, scale=0.5, soft_cap=None)
  pool = lambda heads: pages_lib.allocate(1, 3, z, heads, h, jnp.float32)
  expected, _ = paged(batch, unsharded)(q, key, value, None, pool(k), layer)
  mesh = make_mesh(f'tensor={shards}')
  rules = PRESETS['tensor_parallel'].replace(batch=None)
  shard = constrainer(mesh, rules)
  run = jax.jit(
    lambda b, *args: paged(b, shard)(*args, None, pool(stored), layer)
  )
  out, pages = run(batch, q, key, value)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  repeated = np.repeat(np.asarray(key[0]), stored // k, axis=1)
  in_page = np.asarray(pages.k[0, 1]).swapaxes(0, 1)
  np.testing.assert_array_equal(in_page, repeated[:4])
  assert pages.k.sharding.shard_shape(pages.k.shape)[2] == stored // shards
