"""Groups of sequences attend to their common first pages once.

Juravsky et al., "Hydragen", https://arxiv.org/abs/2402.05099, section 3.1 and
Zhu et al., "RelayAttention", https://arxiv.org/abs/2402.14808, algorithm 1:
attention to a prefix that many sequences share is one product of all their
queries with its keys; each sequence attends to the rest on its own, and the two
are combined by their log-sum-exps.

Deviation: one ragged_paged_attention does each part. For the prefix, a block of
a group's queries is one sequence with a single query of many heads, since all
of them see all of the prefix.

*Cost*: HBM: the prefix once per group and block of its queries, the rest of
each sequence once, and the queries and outputs three times. FLOPs as without.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.common import online_softmax
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention


def shared_prefix_attention(
  q: Float[Array, 'T N H'],
  k_pages: Num[Array, 'L P K Z H'],
  v_pages: Num[Array, 'L P K Z H'],
  layer: Int[Array, ''] | int,
  query_start: Int[Array, 'S1'],
  kv_len: Int[Array, 'S'],
  page_table: Int[Array, 'S M'],
  group_start: Int[Array, 'C1'],
  prefix_pages: Int[Array, 'C'],
  window: Int[Array, ''] | int | None = None,
  sinks: Float[Array, 'N'] | None = None,
  k_scales: Float[Array, 'L P K Z'] | None = None,
  v_scales: Float[Array, 'L P K Z'] | None = None,
  tree_mask: Int[Array, 'T W'] | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
  return_lse: bool = False,
  block_queries: int = 64,
  implementation: str | None = None,
) -> Float[Array, 'T N H'] | tuple[Float[Array, 'T N H'], Float[Array, 'T N']]:
  """`ragged_paged_attention`, reading the prefixes of groups once.

  Args:
    q: As for `ragged_paged_attention`, and so are the others not listed.
    k_pages: Key pool.
    v_pages: Value pool.
    layer: Which layer of the pools.
    query_start: Offsets of the sequences' queries.
    kv_len: Cached tokens of each sequence, those of the prefix included.
    page_table: Pages of each sequence, those of the prefix included.
    group_start: C + 1 offsets into S, non-decreasing: group c consists of the
      sequences `group_start[c] .. group_start[c+1] - 1`; sequences of no group
      share nothing.
    prefix_pages: How many of its first pages are the same for all sequences of
      a group, at most those before the first page with a key of a query.
    window: Number of keys a query sees. Where it is shorter than the longest
      sequence, nothing is shared.
    sinks: A logit per head.
    k_scales: Scales of quantised keys.
    v_scales: Scales of quantised values.
    tree_mask: Which queries of its own sequence each query sees.
    scale: Factor on the logits.
    soft_cap: c in c * tanh(logits / c).
    return_lse: Also return the logarithms of the softmax's denominators.
    block_queries: How many queries read a prefix together.
    implementation: Of `ragged_paged_attention`.

  Returns:
    What `ragged_paged_attention` returns.
  """
  common = dict(
    scale=scale,
    soft_cap=soft_cap,
    return_lse=True,
    implementation=implementation,
  )
  pools, scales = (k_pages, v_pages, layer), (k_scales, v_scales)
  num_kv, page_size = k_pages.shape[2:4]

  def apart():
    rows = query_start, kv_len, page_table, window, sinks, *scales, tree_mask
    return ragged_paged_attention(q, *pools, *rows, **common)

  def together():
    pages_S = _of_group(jnp.arange(kv_len.size), group_start, prefix_pages)
    table = _without_first(page_table, pages_S)
    rest_len = jnp.maximum(kv_len - page_size * pages_S, 0)
    rows = query_start, rest_len, table, None, sinks, *scales, tree_mask
    rest = ragged_paged_attention(q, *pools, *rows, **common)

    size = min(block_queries, q.shape[0])
    starts = query_start[group_start]
    blocks = _blocks(q.shape[0], starts, prefix_pages, size)
    group_A, token_AR, block_start, row_T, shares_T = blocks
    tables = page_table[jnp.minimum(group_start[group_A], kv_len.size - 1)]
    lens = page_size * prefix_pages[group_A]
    rows = block_start, lens, tables, None, None, *scales
    q_blocks = _as_heads(q[token_AR], num_kv)
    out, lse = ragged_paged_attention(q_blocks, *pools, *rows, **common)
    out, lse = (_as_queries(x, num_kv, size)[row_T] for x in (out, lse))
    lse = jnp.where(shares_T[:, None], lse, -jnp.inf)
    return online_softmax.merge(*rest, out, lse)

  if window is None:
    out, lse = together()
  else:
    out, lse = jax.lax.cond(window >= kv_len.max(), together, apart)
  return (out, lse) if return_lse else out


def _group_of(i, starts):
  """Group of each index; the last one for those after it."""
  group = jnp.searchsorted(starts[1:], i, side='right')
  return jnp.minimum(group, starts.size - 2)


def _of_group(i, starts, values):
  """Value of each index's group, 0 for those of none."""
  grouped = (i >= starts[0]) & (i < starts[-1])
  return jnp.where(grouped, values[_group_of(i, starts)], 0)


def _without_first(table_SM, count_S):
  """Each row without its first entries; what follows its last is any page."""
  width = table_SM.shape[1]
  twice = jnp.concatenate([table_SM, table_SM], axis=1)
  # Slices, which a TPU takes faster than single numbers.
  shift = lambda row, count: jax.lax.dynamic_slice_in_dim(row, count, width)
  return jax.vmap(shift)(twice, count_S)


def _blocks(num_tokens, starts, pages, size):
  """Cuts the queries of the groups into blocks of `size`.

  Returns:
    Group and tokens of each block; whether each block exists, as the offsets of
    sequences of one query; row of each token among those of the blocks, and
    whether it has one.
  """
  counts = jnp.where(pages > 0, -(-jnp.diff(starts) // size), 0)
  offset = jnp.append(jnp.zeros(1, counts.dtype), jnp.cumsum(counts))
  block = jnp.arange(num_tokens // size + pages.size)
  group_A = _group_of(block, offset)
  first_A = starts[group_A] + (block - offset[group_A]) * size
  token_AR = first_A[:, None] + jnp.arange(size)
  token_AR = jnp.clip(token_AR, 0, num_tokens - 1)
  block_start = jnp.minimum(jnp.arange(block.size + 1), offset[-1])
  token = jnp.arange(num_tokens)
  group_T = _group_of(token, starts)
  shares_T = _of_group(token, starts, pages) > 0
  row_T = offset[group_T] * size + token - starts[group_T]
  row_T = jnp.where(shares_T, row_T, 0)
  return group_A, token_AR, block_start.astype(jnp.int32), row_T, shares_T


def _as_heads(q_ARNH, num_kv):
  """One query of `R * N` heads per block; kv heads stay outermost."""
  a, r, n, h = q_ARNH.shape
  q = q_ARNH.reshape(a, r, num_kv, n // num_kv, h).swapaxes(1, 2)
  return q.reshape(a, r * n, h)


def _as_queries(x, num_kv, size):
  """Undoes `_as_heads` for `[A, R * N, ...]`: `[A * R, N, ...]`."""
  a, heads, *rest = x.shape
  x = x.reshape(a, num_kv, size, heads // num_kv // size, *rest).swapaxes(1, 2)
  return x.reshape(a * size, heads // size, *rest)
