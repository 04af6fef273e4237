"""flash_attention for XLA: query blocks, each against the keys it can see.

The blocks are unrolled, so causality halves the work by static slices, and a
hand-written backward keeps only the output and the log-sum-exp: memory is
linear in the length, up to one block of scores. Where positions are given,
`xla_positions` looks for the tiles with work.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.flash_attention import xla_positions
from pallas_kernels.flash_attention.gradient import differentiable
from pallas_kernels.flash_attention.reference import NO_KEYS
from pallas_kernels.flash_attention.reference import out_dtype
from pallas_kernels.flash_attention.reference import pair
from pallas_kernels.flash_attention.xla_positions import F32
from pallas_kernels.flash_attention.xla_positions import MASKED
from pallas_kernels.flash_attention.xla_positions import scores

_MIN_BLOCK = 128
_MAX_BLOCKS = 16


def flash_attention(*args, **static):
  """See `api.flash_attention`; returns the output and the log-sum-exp."""
  return differentiable(
    functools.partial(flash_attention_forward, **static),
    functools.partial(flash_attention_backward, **static),
    *args,
  )


def flash_attention_forward(
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
  """Returns the output [B,T,N,H] and the float32 log-sum-exp [B,N,T]."""
  q, k, v = (x.astype(out_dtype(x)) for x in (q, k, v))
  positions = q_positions, kv_positions
  if positions != (None, None):
    return xla_positions.forward(
      *(q, k, v, segment_ids, window, sinks, positions),
      scale=scale,
      soft_cap=soft_cap,
    )
  b, t, n, h = q.shape
  q_BKGTH, k_BKSH, v_BKSH = _heads_first(q, k), _swap(k), _swap(v)
  sinks = _per_group(sinks, k)
  outs, lses = [], []
  for block, keys in _blocks(q):
    s, _ = scores(q_BKGTH[:, :, :, block], k_BKSH[:, :, keys], scale, soft_cap)
    mask = _mask(block, keys, segment_ids, window)
    s = jnp.where(mask, s, MASKED)
    m = jnp.maximum(s.max(axis=-1, keepdims=True), NO_KEYS)
    if sinks is not None:
      m = jnp.maximum(m, sinks)
    p = jnp.exp(s - m)
    l = p.sum(axis=-1, keepdims=True)
    if sinks is not None:
      l += jnp.exp(sinks - m)
    out = jnp.einsum(
      'BKGTS,BKSH->BKGTH', p.astype(v.dtype), v_BKSH[:, :, keys], **F32
    )
    l = jnp.where(l == 0, 1.0, l)
    outs.append((out / l).astype(q.dtype))
    lses.append((m + jnp.log(l))[..., 0])
  out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
  lse = jnp.concatenate(lses, axis=3)
  return out.reshape(b, t, n, h), lse.reshape(b, n, t)


def flash_attention_backward(
  q,
  k,
  v,
  segment_ids,
  window,
  sinks,
  q_positions,
  kv_positions,
  out,
  lse,
  d_out,
  d_lse,
  *,
  scale,
  soft_cap,
):
  """Returns the gradients of q, k, v and sinks (`None` without sinks).

  No `d_lse` is one of zeros.

  With p the probabilities and dp = d_out v^T, the scores' gradient is
  p * (dp - offset), offset = sum(out * d_out) - d_lse.
  """
  if q.dtype.itemsize == 1:
    raise NotImplementedError(f'{q.dtype} has no gradient')
  b, t, n, h = q.shape
  if d_lse is None:
    d_lse = jnp.zeros_like(lse)
  offset = jnp.einsum('BTNH,BTNH->BNT', out, d_out, **F32) - d_lse
  d_sinks = None
  if sinks is not None:
    p_sink = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse)
    d_sinks = -(p_sink * offset).sum((0, 2)).astype(sinks.dtype)
  positions = q_positions, kv_positions
  if positions != (None, None):
    grads = xla_positions.backward(
      *(q, k, v, segment_ids, window, positions, lse, offset, d_out),
      scale=scale,
      soft_cap=soft_cap,
    )
    return *grads, d_sinks
  kv_heads = k.shape[2]
  lse, offset = (
    x.reshape(b, kv_heads, n // kv_heads, t, 1) for x in (lse, offset)
  )
  q_BKGTH, do_BKGTH = _heads_first(q, k), _heads_first(d_out, k)
  k_BKSH, v_BKSH = _swap(k), _swap(v)
  dq = []
  dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k_BKSH, v_BKSH))
  for block, keys in _blocks(q):
    q_b, do_b = q_BKGTH[:, :, :, block], do_BKGTH[:, :, :, block]
    k_b, v_b = k_BKSH[:, :, keys], v_BKSH[:, :, keys]
    s, slope = scores(q_b, k_b, scale, soft_cap)
    mask = _mask(block, keys, segment_ids, window)
    p = jnp.exp(jnp.where(mask, s, MASKED) - lse[:, :, :, block])
    dp = jnp.einsum('BKGTH,BKSH->BKGTS', do_b, v_b, **F32)
    ds = (p * (dp - offset[:, :, :, block]) * slope).astype(q.dtype)
    dq.append(jnp.einsum('BKGTS,BKSH->BKGTH', ds, k_b, **F32).astype(q.dtype))
    dk_b = jnp.einsum('BKGTS,BKGTH->BKSH', ds, q_b, **F32)
    dv_b = jnp.einsum('BKGTS,BKGTH->BKSH', p.astype(q.dtype), do_b, **F32)
    dk, dv = dk.at[:, :, keys].add(dk_b), dv.at[:, :, keys].add(dv_b)
  dq = jnp.concatenate(dq, axis=3).transpose(0, 3, 1, 2, 4).reshape(q.shape)
  return dq, _swap(dk).astype(k.dtype), _swap(dv).astype(v.dtype), d_sinks


def _blocks(q):
  """Slices of queries, and of the keys that they may see."""
  t = q.shape[1]
  size = max(_MIN_BLOCK, -(-t // _MAX_BLOCKS))
  for i in range(0, t, size):
    stop = min(i + size, t)
    yield slice(i, stop), slice(0, stop)


def _mask(block, keys, segment_ids, window):
  """Whether a query sees a key, [B or 1, 1, 1, T, S]."""
  i, j = (jnp.arange(x.start, x.stop)[None] for x in (block, keys))
  behind = i[:, :, None] - j[:, None, :]
  mask = behind >= 0
  if window is not None:
    mask &= behind < window
  if segment_ids is not None:
    of_q, of_kv = pair(segment_ids)
    same = of_q[:, block, None] == of_kv[:, None, keys]
    mask = mask & same
  return mask[:, None, None]


def _swap(x):
  """[B,S,K,H] to [B,K,S,H] and back."""
  return x.swapaxes(1, 2)


def _heads_first(q, k):
  """[B,T,N,H] to [B,K,G,T,H]."""
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)


def _per_group(sinks, k):
  """[N] to float32 [K,G,1,1]."""
  if sinks is None:
    return None
  return sinks.astype(jnp.float32).reshape(k.shape[2], -1, 1, 1)
