"""Ground truth for flash_attention: the whole score matrix, in float32."""

import jax
import jax.numpy as jnp

# Log-sum-exp of a query that sees no key, in every backend. It is finite so
# that attention over parts of the keys merges without special cases.
NO_KEYS = -1e30


def pair(x):
  """What is of queries and keys alike, once for each."""
  return x if isinstance(x, tuple) else (x, x)


def out_dtype(q):
  """That of the output: the queries', and bfloat16 if they have 8 bits."""
  return jnp.bfloat16 if q.dtype.itemsize == 1 else q.dtype


def flash_attention(
  q,
  k,
  v,
  segment_ids,
  window,
  sinks,
  q_positions,
  kv_positions,
  *,
  scale,
  soft_cap,
):
  """See `api.flash_attention`; returns the output and the log-sum-exp."""
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (k, v))
  s_BNTS = scale * jnp.einsum('BTNH,BSNH->BNTS', q.astype(jnp.float32), k)
  if soft_cap is not None:
    s_BNTS = soft_cap * jnp.tanh(s_BNTS / soft_cap)
  i = jnp.arange(q.shape[1])[None] if q_positions is None else q_positions
  j = jnp.arange(k.shape[1])[None] if kv_positions is None else kv_positions
  behind = i[:, :, None] - j[:, None, :]
  mask = behind >= 0
  if window is not None:
    mask &= behind < window
  if segment_ids is not None:
    of_q, of_kv = pair(segment_ids)
    mask &= of_q[:, :, None] == of_kv[:, None, :]
  s_BNTS = jnp.where(mask[:, None], s_BNTS, -jnp.inf)
  m_BNT1 = s_BNTS.max(axis=-1, keepdims=True)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32)[:, None, None]
    m_BNT1 = jnp.maximum(m_BNT1, sinks)
  m_BNT1 = jax.lax.stop_gradient(jnp.maximum(m_BNT1, NO_KEYS))
  p_BNTS = jnp.exp(s_BNTS - m_BNT1)
  l_BNT1 = p_BNTS.sum(axis=-1, keepdims=True)
  if sinks is not None:
    l_BNT1 += jnp.exp(sinks - m_BNT1)
  empty = l_BNT1 == 0
  l_BNT1 = jnp.where(empty, 1.0, l_BNT1)
  lse_BNT1 = jnp.where(empty, NO_KEYS, m_BNT1 + jnp.log(l_BNT1))
  out = jnp.einsum('BNTS,BSNH->BTNH', p_BNTS / l_BNT1, v).astype(out_dtype(q))
  return out, lse_BNT1[..., 0]
