"""Slots written by DMAs: any batch, races, quantised pages."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_update import kv_update
from pallas_kernels.kv_update import pallas_tpu

L, P, K, Z, H = 2, 6, 2, 8, 8


@jax.jit
def _run(slot, k_new, v_new):
  pool = jnp.arange(L * P * K * Z * H, dtype=jnp.float32)
  pool = pool.reshape(L, P, K, Z, H)
  # Few runs in flight and small blocks: both wrap around often.
  config = dict(ring=4, block_tokens=16)
  out = pallas_tpu.kv_update(
    pool, -pool, 1, slot, k_new, v_new, None, None, config=config
  )
  return pool, out


def _expected(pool, slot, new):
  pool = np.array(pool)
  for t, s in enumerate(slot):
    if 0 <= s < P * Z:
      pool[1, s // Z, :, s % Z] = new[t]
  return pool


def _check(slot):
  new = np.random.default_rng(0).normal(size=(2, len(slot), K, H))
  pool, (k_pages, v_pages, _, _) = _run(np.int32(slot), *np.float32(new))
  new = np.float32(new)
  np.testing.assert_array_equal(k_pages, _expected(pool, slot, new[0]))
  np.testing.assert_array_equal(v_pages, _expected(-pool, slot, new[1]))


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.data())
def test_any_slots(data):
  """Tokens of a page may come in any order, with dropped ones between."""
  slots = data.draw(st.permutations(range(P * Z)))[:24]
  ordered = data.draw(st.integers(0, 24))
  dropped = data.draw(st.sets(st.integers(0, 23)))
  slots = sorted(slots[:ordered]) + slots[ordered:]
  _check([-1 if t in dropped else s for t, s in enumerate(slots)])


@pytest.mark.parametrize('order', ['runs', 'one_page'])
def test_no_races(order):
  """Runs of a prefill, and tokens of one page that are no neighbours."""
  slots = np.arange(3, 27) if order == 'runs' else np.arange(24) * 5 % 24
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    jax.clear_caches()
    _check(slots)
  from jax._src.pallas.mosaic.interpret import (  # noqa: PLC0415
    interpret_pallas_call as interpreter,
  )

  assert not interpreter.races.races_found


def test_pools_are_donated():
  pool = jax.ShapeDtypeStruct((4, 64, K, Z, H), jnp.float32)
  new = jax.ShapeDtypeStruct((3, K, H), jnp.float32)
  slot = jax.ShapeDtypeStruct((3,), jnp.int32)
  update = jax.jit(
    lambda k, v, slot, new: kv_update(k, v, 2, slot, new, new),
    donate_argnums=(0, 1),
  )
  memory = update.lower(pool, pool, slot, new).compile().memory_analysis()
  assert memory.alias_size_in_bytes == 2 * 4 * 64 * K * Z * H * 4


@pytest.mark.parametrize('dtype, error', [('int8', 8e-3), ('int4', 0.15)])
def test_quantised_keys_come_back(dtype, error):
  new = jax.random.normal(jax.random.key(0), (9, K, H))
  pool = jnp.zeros((1, P, K, Z, H), dtype)
  scales = jnp.zeros(pool.shape[:4])
  slot = jnp.arange(5, 14)
  k, _, k_scales, _ = kv_update(pool, pool, 0, slot, new, new, scales, scales)
  got = k.astype(jnp.float32) * k_scales[..., None]
  got = got[0].swapaxes(1, 2).reshape(P * Z, K, H)
  largest = np.abs(new).max(axis=-1, keepdims=True)
  assert np.all(np.abs(got[slot] - new) <= error * largest)
  assert not np.any(np.delete(got, slot, axis=0))


def test_what_does_not_fit_is_an_error():
  pool, new = jnp.zeros((L, P, K, Z, H)), jnp.zeros((3, K, H))
  slot = jnp.zeros(3, jnp.int32)
  with pytest.raises(ValueError, match='come together'):
    kv_update(pool, pool, 0, slot, new, new, pool[..., 0])
  with pytest.raises(ValueError, match='need k_scales'):
    whole = pool.astype(jnp.int8)
    kv_update(whole, whole, 0, slot, new, new)
