"""Public entry point of flash_attention."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import dispatch


def flash_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K H'],
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  window: Int[Array, ''] | int | None = None,
  scale: float | None = None,
  soft_cap: float | None = None,
  implementation: str | None = None,
) -> Float[Array, 'B T N H']:
  """Causal self-attention with grouped queries.

  Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithms 1 and 2:
  the softmax is recomputed in the backward pass from its log-sum-exp.

  Query i sees key j if j <= i, both are in the same segment, and i - j is
  below `window`.

  Args:
    q: Queries; N is a multiple of K and query head n reads kv head n // (N/K).
    k: Keys.
    v: Values.
    segment_ids: Segment of each token; `None` is one segment per row.
    window: Number of keys a query sees, itself included; may be traced.
    scale: Factor on the logits, H ** -0.5 by default.
    soft_cap: c in c * tanh(logits / c), applied before the mask.
    implementation: 'reference', 'xla', 'pallas_tpu' or 'pallas_gpu'; `None` is
      the fastest that accepts these inputs where the program will run.

  Returns:
    Attention output in the dtype of `q`; the softmax is float32.

  Raises:
    ValueError: Shapes that do not belong together.
  """
  if q.ndim != 4 or k.shape != v.shape or q.shape[2] % k.shape[2]:
    raise ValueError(
      f'flash_attention needs q [B,T,N,H] and k, v [B,T,K,H] with N a multiple '
      f'of K; got {q.shape=}, {k.shape=}, {v.shape=}'
    )
  if q.shape[:2] + q.shape[3:] != k.shape[:2] + k.shape[3:]:
    raise ValueError(f'q and k disagree: {q.shape=}, {k.shape=}')
  window = None if window is None else jax.numpy.asarray(window, 'int32')
  return dispatch(
    'flash_attention',
    q,
    k,
    v,
    segment_ids,
    window,
    scale=q.shape[-1] ** -0.5 if scale is None else scale,
    soft_cap=soft_cap,
    implementation=implementation,
  )
