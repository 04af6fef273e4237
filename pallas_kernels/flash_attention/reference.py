"""Ground truth for flash_attention: the whole score matrix, in float32."""

import jax
import jax.numpy as jnp


def flash_attention(q, k, v, segment_ids, window, *, scale, soft_cap):
  """See `api.flash_attention`."""
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (k, v))
  s_BNTS = scale * jnp.einsum('BTNH,BSNH->BNTS', q.astype(jnp.float32), k)
  if soft_cap is not None:
    s_BNTS = soft_cap * jnp.tanh(s_BNTS / soft_cap)
  i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
  mask = (j <= i)[None]
  if window is not None:
    mask &= i - j < window
  if segment_ids is not None:
    mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
  p_BNTS = jax.nn.softmax(jnp.where(mask[:, None], s_BNTS, -jnp.inf), axis=-1)
  return jnp.einsum('BNTS,BSNH->BTNH', p_BNTS, v).astype(q.dtype)
