"""flash_attention by cuDNN, for what the kernels for GPUs decline.

Calls `jax.nn.dot_product_attention(implementation='cudnn')`, the public way to
cuDNN's fused attention: causal, grouped queries, 16 bits, and nothing else that
the op knows. cuDNN wants compute capability 8.0; JAX refuses head dims that its
version does not take, and a process without cuDNN, while the call is traced.

Deviations: JAX rounds the log-sum-exp to the dtype of q. XLA for GPUs drops a
rounding that is undone at once, unless `xla_allow_excess_precision` is off;
what is promised is the log-sum-exp to the precision of q. Gradients do not use
it: the public function keeps its own, in float32, for its own gradient, so the
backward pass runs the forward pass once more. XLA merges the two calls where
both passes are in one computation, but not where layers are a loop.

Cost: 4 B N T S H FLOPs forward and 14 backward, about half of that because of
causality; 14 more if the log-sum-exp has a gradient that is not zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import chip
from pallas_kernels.common import varying
from pallas_kernels.flash_attention.gradient import differentiable

_DTYPES = (jnp.bfloat16, jnp.float16)
_MULTIPLE = 8
_CAPABILITY = (8, 0)


def flash_attention(*args: Any, **static: Any) -> tuple[jax.Array, jax.Array]:
  """See `api.flash_attention`; returns the output and the log-sum-exp."""
  return differentiable(
    functools.partial(flash_attention_forward, **static),
    functools.partial(flash_attention_backward, **static),
    *args,
  )


def flash_attention_forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: Any,
  window: jax.Array | None,
  sinks: jax.Array | None,
  q_positions: jax.Array | None,
  kv_positions: jax.Array | None,
  *,
  scale: float,
  soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B,T,N,H] and the float32 log-sum-exp [B,N,T].

  Raises:
    NotImplementedError: Inputs that cuDNN does not take, or no cuDNN.
  """
  _check(q, k, v, segment_ids, window, sinks, q_positions, kv_positions)
  _check_soft_cap(soft_cap)
  out, lse = _attend(q, k, v, scale, return_residual=True)
  # The conversion next to the rounding that it undoes.
  lse = lse.astype(jnp.float32).swapaxes(1, 2)
  return varying.vary_as(out, q), varying.vary_as(lse, q)


def flash_attention_backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: Any,
  window: jax.Array | None,
  sinks: jax.Array | None,
  q_positions: jax.Array | None,
  kv_positions: jax.Array | None,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array | None,
  *,
  scale: float,
  soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """Returns the gradients of q, k, v, and `None` for the sinks.

  Raises:
    NotImplementedError: As in `flash_attention_forward`.
  """
  del out, lse
  _check(q, k, v, segment_ids, window, sinks, q_positions, kv_positions)
  _check_soft_cap(soft_cap)
  attend = functools.partial(_attend, scale=scale)
  _, vjp = jax.vjp(attend, q, k, v)
  dq, dk, dv = (varying.vary_as(d, q) for d in vjp(d_out.astype(q.dtype)))
  if d_lse is not None:
    dq, dk = _add_d_lse(q, k, dq, dk, d_lse, scale)
  return dq, dk, dv, None


def _add_d_lse(q, k, dq, dk, d_lse, scale):
  """Adds the gradients through the log-sum-exp, if there are any.

  Its derivative by the logits is the softmax p: dq_i has a term
  `scale * d_lse_i * sum_j p_ij k_j`, attention with k for values, and dk_j one
  of `scale * sum_i p_ij d_lse_i q_i`, the gradient of that attention's values.
  """

  def add(dq, dk):
    d_logits = scale * d_lse.astype(jnp.float32).swapaxes(1, 2)[..., None]
    mean_k, vjp = jax.vjp(lambda v: _attend(q, k, v, scale=scale), k)
    d_q = d_logits * mean_k.astype(jnp.float32)
    # Each row as large as q allows in its dtype, whatever the gradient is.
    size = jnp.maximum(jnp.max(jnp.abs(d_logits)), jnp.finfo(jnp.float32).tiny)
    (d_k,) = vjp((d_logits / size * q.astype(jnp.float32)).astype(q.dtype))
    d_k = size * d_k.astype(jnp.float32)
    d_q, d_k = varying.vary_as(d_q, q), varying.vary_as(d_k, q)
    return tuple(
      (d.astype(jnp.float32) + more).astype(d.dtype)
      for d, more in ((dq, d_q), (dk, d_k))
    )

  # Zeros are what most callers give. XLA leaves out a branch that it can see
  # is not taken.
  return jax.lax.cond(jnp.any(d_lse != 0), add, lambda dq, dk: (dq, dk), dq, dk)


def _attend(q, k, v, scale, **kwargs):
  try:
    return jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=True, implementation='cudnn', **kwargs
    )
  except RuntimeError as e:
    if isinstance(e, NotImplementedError) or 'cuDNN' not in str(e):
      raise
    raise NotImplementedError(f'JAX cannot call cuDNN: {e}') from e


def _check(q, k, v, segment_ids, window, sinks, q_positions, kv_positions):
  given = dict(
    segment_ids=segment_ids,
    window=window,
    sinks=sinks,
    q_positions=q_positions,
    kv_positions=kv_positions,
  )
  for name, a in given.items():
    if a is not None:
      raise NotImplementedError(f'cuDNN is called without {name}')
  if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
    raise NotImplementedError(
      f'cuDNN takes bfloat16 or float16, of all three alike, not '
      f'{q.dtype.name}, {k.dtype.name}, {v.dtype.name}'
    )
  if q.shape[1] != k.shape[1]:
    raise NotImplementedError(
      f'{q.shape[1]} queries and {k.shape[1]} keys have no causal order'
    )
  if q.shape[1] % 2:
    # Asked of both directions, so that they are cuDNN's or another's alike.
    raise NotImplementedError(
      f'JAX takes an even number of tokens for gradients, not {q.shape[1]}'
    )
  if q.shape[-1] % _MULTIPLE:
    raise NotImplementedError(
      f'head dim {q.shape[-1]} is not a multiple of {_MULTIPLE}'
    )
  _check_gpu()


def _check_soft_cap(soft_cap):
  if soft_cap is not None:
    raise NotImplementedError(f'cuDNN is called without a cap, not {soft_cap}')


def _check_gpu():
  """Without a GPU a program may be lowered for one elsewhere."""
  device = chip.default_gpu()
  if device is None:
    return
  capability = str(getattr(device, 'compute_capability', 'unknown'))
  parts = capability.split('.')
  if not all(part.isdigit() for part in parts) or (
    tuple(int(part) for part in parts) < _CAPABILITY
  ):
    raise NotImplementedError(
      f'{device.device_kind} has compute capability {capability}, and cuDNN '
      f'needs {".".join(map(str, _CAPABILITY))}'
    )
