"""Every serving attend: prefill, then decodes, equals one dense causal pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import attention
from jaxserve.attention import base
from jaxserve.cache import pages as pages_lib
from jaxtrain.models.attention import Causal
from jaxtrain.models.attention import LayerSpec
from jaxtrain.sharding import unsharded

N, K, H, Z = 4, 2, 8, 4
LENGTHS = (11, 5)


def _layer(window):
  window = None if window is None else jnp.int32(window)
  return LayerSpec(jnp.int32(1), window, scale=H**-0.5, soft_cap=3.0)


def _batch(starts, stops, table):
  counts = [b - a for a, b in zip(starts, stops, strict=True)]
  positions = np.concatenate(
    [np.arange(a, b) for a, b in zip(starts, stops, strict=True)]
  )
  rows = np.repeat(np.arange(len(counts)), counts)
  return base.Batch(
    tokens=jnp.zeros(len(rows), jnp.int32),
    positions=jnp.array(positions),
    slot=jnp.array(table[rows, positions // Z] * Z + positions % Z),
    query_start=jnp.array(np.concatenate([[0], np.cumsum(counts)])),
    kv_len=jnp.array(stops),
    page_table=jnp.array(table),
  )


@pytest.mark.parametrize('window', [None, 4])
@pytest.mark.parametrize('name', attention.names())
def test_prefill_and_decode_equal_a_causal_pass(name, window):
  make_attend = attention.get(name)
  keys = jax.random.split(jax.random.key(0), 3)
  width = max(LENGTHS)
  q, k, v = (
    jax.random.normal(key, (len(LENGTHS), width, n, H))
    for key, n in zip(keys, (N, K, K), strict=True)
  )
  layer = _layer(window)
  expected, _ = Causal()(q, k, v, None, None, layer)
  table = np.array([[6, 1, 3], [0, 5, 2]])
  # Stale pages must not leak.
  stale = jnp.full((2, 7, K, Z, H), jnp.nan)
  pages = pages_lib.Pages(stale, stale)
  run = jax.jit(
    lambda b, q, k, v, p: make_attend(b, unsharded)(q, k, v, None, p, layer)
  )
  for starts, stops in (
    ((0, 0), (6, 2)),
    ((6, 2), (7, 2)),
    ((7, 2), (8, 3)),
    ((8, 3), LENGTHS),
  ):
    flat = lambda x: jnp.concatenate(
      [x[i, a:b] for i, (a, b) in enumerate(zip(starts, stops, strict=True))]
    )
    batch = _batch(starts, stops, table)
    out, pages = run(batch, flat(q)[None], flat(k)[None], flat(v)[None], pages)
    np.testing.assert_allclose(out[0], flat(expected), rtol=2e-5, atol=2e-5)
