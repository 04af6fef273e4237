"""Ground truth: one token after the other."""

import jax
import jax.numpy as jnp


def kv_update(k_pages, v_pages, layer, slot, k_new, v_new, k_scales, v_scales):
  """See `api.kv_update`."""
  num_pages, _, page_size = k_pages.shape[1:4]

  def store(pages, scales, new):
    def token(t, pool):
      pages, scales = pool
      stored = (slot[t] >= 0) & (slot[t] < num_pages * page_size)
      page, offset = slot[t] // page_size, slot[t] % page_size
      x_KH = new[t].astype(jnp.float32)
      if scales is not None:
        top = largest(pages.dtype)
        scale_K = jnp.abs(x_KH).max(axis=-1) * jnp.float32(1 / top)
        x_KH = x_KH / jnp.where(scale_K > 0, scale_K, 1)[:, None]
        scales = scales.at[layer, page, :, offset].set(
          jnp.where(stored, scale_K, scales[layer, page, :, offset])
        )
      if jnp.issubdtype(pages.dtype, jnp.integer):
        x_KH = jnp.round(x_KH)
      old = pages[layer, page, :, offset]
      new_pages = pages.at[layer, page, :, offset].set(
        jnp.where(stored, x_KH.astype(pages.dtype), old)
      )
      return new_pages, scales

    return jax.lax.fori_loop(0, slot.shape[0], token, (pages, scales))

  k_pages, k_scales = store(k_pages, k_scales, k_new)
  v_pages, v_scales = store(v_pages, v_scales, v_new)
  return k_pages, v_pages, k_scales, v_scales


def largest(dtype) -> float:
  """The largest number of a type, to which the largest key is scaled."""
  whole = jnp.issubdtype(dtype, jnp.integer)
  return float((jnp.iinfo if whole else jnp.finfo)(dtype).max)
