"""flash_attention for XLA: query blocks, each against the keys it can see.

The blocks are unrolled, so causality halves the work by static slices, and a
hand-written backward keeps only the output and the log-sum-exp: memory is
linear in the length, up to one block of scores.
"""

import functools

import jax
import jax.numpy as jnp

_MIN_BLOCK = 128
_MAX_BLOCKS = 16
_MASKED = -1e30


def flash_attention(q, k, v, segment_ids, window, *, scale, soft_cap):
  """See `api.flash_attention`."""
  b, t, n, h = q.shape
  num_kv = k.shape[2]
  q_BKGTH = q.reshape(b, t, num_kv, n // num_kv, h).transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out = _attention(
    scale, soft_cap, q_BKGTH, k_BKSH, v_BKSH, segment_ids, window
  )
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _blocks(t):
  """(start, stop) of the query blocks."""
  size = max(_MIN_BLOCK, -(-t // _MAX_BLOCKS))
  return [(i, min(i + size, t)) for i in range(0, t, size)]


def _mask(start, stop, segment_ids, window):
  i, j = jnp.arange(start, stop)[:, None], jnp.arange(stop)
  mask = (j <= i)[None]
  if window is not None:
    mask &= i - j < window
  if segment_ids is not None:
    same = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
    mask = mask & same
  return mask[:, None, None]


def _scores(q, k, scale):
  return scale * jnp.einsum(
    'BKGTH,BKSH->BKGTS', q, k, preferred_element_type=jnp.float32
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, soft_cap, q, k, v, segment_ids, window):
  return _forward(scale, soft_cap, q, k, v, segment_ids, window)[0]


def _forward(scale, soft_cap, q, k, v, segment_ids, window):
  outs, lses = [], []
  for start, stop in _blocks(q.shape[3]):
    s = _scores(q[:, :, :, start:stop], k[:, :, :stop], scale)
    if soft_cap is not None:
      s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(_mask(start, stop, segment_ids, window), s, _MASKED)
    m = s.max(axis=-1, keepdims=True)
    p = jnp.exp(s - m)
    l = p.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
      'BKGTS,BKSH->BKGTH',
      p.astype(v.dtype),
      v[:, :, :stop],
      preferred_element_type=jnp.float32,
    )
    outs.append((out / l).astype(q.dtype))
    lses.append(m + jnp.log(l))
  out = jnp.concatenate(outs, axis=3)
  return out, (q, k, v, segment_ids, window, out, lses)


def _backward(scale, soft_cap, residuals, d_out):
  q, k, v, segment_ids, window, out, lses = residuals
  dq = []
  dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  f32 = dict(preferred_element_type=jnp.float32)
  for (start, stop), lse in zip(_blocks(q.shape[3]), lses, strict=True):
    q_b, k_b, v_b = q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop]
    do_b = d_out[:, :, :, start:stop]
    s = _scores(q_b, k_b, scale)
    d_cap = 1.0
    if soft_cap is not None:
      tanh = jnp.tanh(s / soft_cap)
      s, d_cap = soft_cap * tanh, 1 - tanh**2
    s = jnp.where(_mask(start, stop, segment_ids, window), s, _MASKED)
    p = jnp.exp(s - lse)
    delta = jnp.sum(
      do_b.astype(jnp.float32) * out[:, :, :, start:stop].astype(jnp.float32),
      axis=-1,
      keepdims=True,
    )
    dp = jnp.einsum('BKGTH,BKSH->BKGTS', do_b, v_b, **f32)
    ds = (scale * p * (dp - delta) * d_cap).astype(q.dtype)
    dq.append(jnp.einsum('BKGTS,BKSH->BKGTH', ds, k_b, **f32).astype(q.dtype))
    dk_b = jnp.einsum('BKGTS,BKGTH->BKSH', ds, q_b, **f32)
    dv_b = jnp.einsum('BKGTS,BKGTH->BKSH', p.astype(q.dtype), do_b, **f32)
    dk, dv = dk.at[:, :, :stop].add(dk_b), dv.at[:, :, :stop].add(dv_b)
  dq = jnp.concatenate(dq, axis=3)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)
