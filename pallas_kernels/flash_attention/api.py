"""Public entry point of flash_attention."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.flash_attention.gradient import differentiable
from pallas_kernels.flash_attention.reference import pair

# One row may be for all of the batch.
_PerToken = Int[Array, '#B T']
_PerKey = Int[Array, '#B S']


def flash_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K H'],
  *,
  segment_ids: _PerToken | tuple[_PerToken, _PerKey] | None = None,
  window: Int[Array, ''] | int | None = None,
  sinks: Float[Array, 'N'] | None = None,
  positions: _PerToken | tuple[_PerToken, _PerKey] | None = None,
  scale: float | None = None,
  soft_cap: float | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> (
  Float[Array, 'B T N H']
  | tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]
):
  """Causal self-attention with grouped queries.

  Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithms 1 and 2:
  the softmax is recomputed in the backward pass from its log-sum-exp.

  A query at position i sees a key at position j if j <= i, both are in the same
  segment, and i - j is below `window`.

  Args:
    q: Queries; N is a multiple of K and query head n reads kv head n // (N/K).
    k: Keys.
    v: Values.
    segment_ids: Segment of each token, or a pair of those of the queries and
      those of the keys; `None` is one segment per row.
    window: Number of keys a query sees, itself included; may be traced.
    sinks: A logit for each query head that joins the sum of its softmax and
      nothing else (Xiao et al., https://arxiv.org/abs/2309.17453, section 3.3).
    positions: Positions of queries and keys, or a pair of those of the queries
      and those of the keys; `None` is their index in the row. In any order:
      tiles that no query sees are skipped.
    scale: Factor on the logits, H ** -0.5 by default.
    soft_cap: c in c * tanh(logits / c), applied before the mask.
    return_lse: Whether to return the log-sum-exp too; it has a gradient.
    implementation: 'reference', 'xla', 'pallas_tpu', 'pallas_gpu' or 'cudnn';
      `None` is the fastest that accepts these inputs where the program will
      run.

  Returns:
    Attention output in the dtype of `q`, or bfloat16 if that has 8 bits, which
    has no gradient; the softmax is float32. With
    `return_lse` also the float32 natural logarithm of each query's softmax sum,
    sink included. Of a query that sees no key the output is 0, and the
    logarithm the finite -1e30 if there is no sink.

  Raises:
    ValueError: Shapes that do not belong together.
  """
  _check(q, k, v, segment_ids, positions, sinks)
  window = None if window is None else jnp.asarray(window, jnp.int32)
  out, lse = _attend(
    implementation,
    (q, k, v, segment_ids, window, sinks, *pair(positions)),
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    soft_cap=soft_cap,
  )
  return (out, lse) if return_lse else out


def _check(q, k, v, segment_ids, positions, sinks):
  if q.ndim != 4 or k.shape != v.shape or q.shape[2] % k.shape[2]:
    raise ValueError(
      f'flash_attention needs q [B,T,N,H] and k, v [B,S,K,H] with N a multiple '
      f'of K; got {q.shape=}, {k.shape=}, {v.shape=}'
    )
  if q.shape[::3] != k.shape[::3]:
    raise ValueError(f'q and k disagree: {q.shape=}, {k.shape=}')
  if sinks is not None and sinks.shape != q.shape[2:3]:
    raise ValueError(f'{sinks.shape=} should be {q.shape[2:3]}, one per head')
  for name, a in dict(segment_ids=segment_ids, positions=positions).items():
    if a is None:
      if name == 'positions' and q.shape[1] != k.shape[1]:
        raise ValueError(
          f'{q.shape[1]} queries and {k.shape[1]} keys need a pair of positions'
        )
      continue
    for each, x in zip(pair(a), (q, k), strict=True):
      shapes = (x.shape[:2], (1, x.shape[1]))
      if each is not None and each.shape not in shapes:
        raise ValueError(f'{name} of shape {each.shape} for {x.shape}')


def _attend(implementation, args, **static):
  call = functools.partial(dispatch, 'flash_attention', **static)
  if implementation is not None:
    return call(*args, implementation=implementation)

  return differentiable(
    functools.partial(call, function='flash_attention_forward'),
    functools.partial(call, function='flash_attention_backward'),
    *args,
  )
