"""Public entry point of ragged_paged_attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import dispatch


def ragged_paged_attention(
  q: Float[Array, 'T N H'],
  k_pages: Float[Array, 'L P K Z H'],
  v_pages: Float[Array, 'L P K Z H'],
  layer: Int[Array, ''] | int,
  query_start: Int[Array, 'S1'],
  kv_len: Int[Array, 'S'],
  page_table: Int[Array, 'S M'],
  window: Int[Array, ''] | int | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
  implementation: str | None = None,
) -> Float[Array, 'T N H']:
  """Causal attention of many sequences' newest tokens to their cached keys.

  Kwon et al., "Efficient Memory Management for Large Language Model Serving
  with PagedAttention", https://arxiv.org/abs/2309.06180, section 4.1, for
  prefill chunks and decodes mixed in one flat batch.

  Sequence s owns query rows `query_start[s] .. query_start[s+1] - 1`; they are
  its last tokens, and their keys are already in its pages. Position p of it is
  slot `p % Z` of page `page_table[s, p // Z]`.

  Args:
    q: Queries of all sequences, one after the other, padded at the end.
    k_pages: Key pool; all layers, so that a scan over layers updates it in
      place.
    v_pages: Value pool.
    layer: Which layer of the pools.
    query_start: S + 1 offsets into T, non-decreasing; a sequence with no query
      in this step has an empty run.
    kv_len: Cached tokens of each sequence, the new ones included.
    page_table: Pages of each sequence; entries past its length are ignored.
    window: Number of keys a query sees, itself included.
    scale: Factor on the logits.
    soft_cap: c in c * tanh(logits / c).
    implementation: 'reference', 'xla', 'pallas_tpu', 'pallas_gpu' or `None`.

  Returns:
    Attention output; rows that belong to no sequence are unspecified but
    finite.
  """
  if q.shape[1] % k_pages.shape[2] or k_pages.shape != v_pages.shape:
    raise ValueError(
      f'ragged_paged_attention: {q.shape=} does not fit {k_pages.shape=}, '
      f'{v_pages.shape=}'
    )
  window = None if window is None else jnp.asarray(window, jnp.int32)
  return dispatch(
    'ragged_paged_attention',
    q,
    k_pages,
    v_pages,
    jnp.asarray(layer, jnp.int32),
    query_start,
    kv_len,
    page_table,
    window,
    scale=scale,
    soft_cap=soft_cap,
    implementation=implementation,
  )
