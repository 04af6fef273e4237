"""kv_update for XLA: a scatter by page and offset."""

import jax.numpy as jnp

from pallas_kernels.kv_update.reference import largest


def kv_update(k_pages, v_pages, layer, slot, k_new, v_new, k_scales, v_scales):
  """See `api.kv_update`."""
  page_size = k_pages.shape[3]
  # Negative indices would wrap around; past the end is dropped.
  page = jnp.where(slot < 0, k_pages.shape[1], slot // page_size)

  def store(pool, new):
    at = pool.at[layer, page, :, slot % page_size]
    return at.set(new.astype(pool.dtype), mode='drop')

  if k_scales is None:
    return store(k_pages, k_new), store(v_pages, v_new), None, None
  k_new, k_scale = quantize(k_new, k_pages.dtype)
  v_new, v_scale = quantize(v_new, v_pages.dtype)
  return (
    store(k_pages, k_new),
    store(v_pages, v_new),
    store(k_scales, k_scale),
    store(v_scales, v_scale),
  )


def quantize(x, dtype):
  """`x [..., H]` in `dtype`, and its float32 scales `[...]`."""
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(axis=-1) * jnp.float32(1 / largest(dtype))
  x = x / jnp.where(scale > 0, scale, 1)[..., None]
  whole = jnp.issubdtype(dtype, jnp.integer)
  return (jnp.round(x) if whole else x).astype(dtype), scale
