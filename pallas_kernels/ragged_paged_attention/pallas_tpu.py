"""ragged_paged_attention for TPUs: one kernel, one stream of chunks of keys.

Prefill chunks, decodes and everything between in one call whose contents are
known only when it runs, as in Jiang et al., "Ragged Paged Attention",
https://arxiv.org/abs/2604.15464. Here the page table stays in HBM, and the
chunks of all sequences form one stream, see `pallas_tpu_stream`; on chips of
two cores that work as one, each takes half of the stream, and half of the keys
of a long decode (Dao et al., "Flash-Decoding for long-context inference",
https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

Deviations: keys and values are stored by a kernel before this one; queries are
read where the results are written, so that rows of no sequence stay finite.

*Cost*: HBM: K and V once per decode and once per `queries` queries of a longer
run, q and the output once; a page is one copy for K and one for V. FLOPs: 4 N H
per (query, key) seen, and the rest of 256 keys where the mask is cut. VMEM:
`buffers` chunks, and about 3 KiB per query of a tile and head at H = 128.
"""

from collections.abc import Mapping
import functools
import math
import types
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import online_softmax
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.ragged_paged_attention import pallas_tpu_decode as decode
from pallas_kernels.ragged_paged_attention import pallas_tpu_partial
from pallas_kernels.ragged_paged_attention import pallas_tpu_plan as plan_lib
from pallas_kernels.ragged_paged_attention import pallas_tpu_softmax as softmax
from pallas_kernels.ragged_paged_attention import pallas_tpu_stream as stream
from pallas_kernels.ragged_paged_attention import pallas_tpu_tile as tile
from pallas_kernels.ragged_paged_attention.features import features

_LANES = 128
_NO_WINDOW = 2**30
_TREE_WORDS = 8


def candidates(chip_name: str, *args, **static) -> list[dict[str, Any]]:
  """Configurations worth trying."""
  del args, static
  return [
    dict(chunk_kib=chunk_kib, rows=rows, buffers=buffers)
    for chunk_kib in (2048, 4096, 8192)
    for rows in (512, 1024)
    for buffers in (2, 3)
    if chip_name != 'v4' or chunk_kib * rows * buffers <= 2**22
  ]


def ragged_paged_attention(
  q,
  k_pages,
  v_pages,
  layer,
  query_start,
  kv_len,
  page_table,
  window=None,
  sinks=None,
  k_scales=None,
  v_scales=None,
  tree_mask=None,
  kv_position=None,
  *,
  scale,
  soft_cap=None,
  return_lse=False,
  config: Mapping[str, Any] | None = None,
):
  """See `api.ragged_paged_attention`.

  `config` may set 'chunk_kib', the keys and values of an item of work, 'rows',
  the query rows of a kv head that are computed together, 'buffers', the chunks
  in VMEM, and 'tile_cost', see `pallas_tpu_plan.Plan`.
  """
  _check(q, k_pages, k_scales, tree_mask)
  options = dict(
    scale=scale, soft_cap=soft_cap, return_lse=return_lse, config=config
  )
  rows = query_start, kv_len, page_table, window
  scales = dict(k_scales=k_scales, v_scales=v_scales)
  if kv_position is None:
    pools = k_pages, v_pages, layer
    return _all_pages(
      q, *pools, *rows, sinks, tree_mask=tree_mask, **scales, **options
    )
  if tree_mask is not None:
    raise NotImplementedError('a tree over pages with positions')
  run = functools.partial(_all_pages, **scales, **options)
  return pallas_tpu_partial.attend(
    run, q, k_pages, v_pages, layer, rows, kv_position, sinks
  )


def _all_pages(
  q,
  k_pages,
  v_pages,
  layer,
  query_start,
  kv_len,
  page_table,
  window,
  sinks,
  *,
  k_scales,
  v_scales,
  tree_mask=None,
  scale,
  soft_cap,
  return_lse,
  config,
):
  """All pages of the sequences, or all that count."""
  chip = chip_lib.current()
  op = 'ragged_paged_attention'
  if config is None:
    config = tuned.lookup(op, chip.name, features(q, k_pages))
  plan = plan_lib.plan_for(
    chip,
    config,
    q,
    k_pages,
    page_table,
    scale=scale,
    soft_cap=soft_cap,
    has_window=window is not None,
    has_windows=getattr(window, 'ndim', 0) == 1,
    has_sinks=sinks is not None,
    has_scales=k_scales is not None,
    tree_words=0 if tree_mask is None else tree_mask.shape[1],
    return_lse=return_lse,
  )
  inputs = dict(
    query_start=query_start.astype(jnp.int32),
    kv_len=kv_len.astype(jnp.int32),
    params=_params(layer, window),
    page_table=_table_rows(page_table, plan),
    q=_head_rows(q, plan),
    k_pages=k_pages,
    v_pages=v_pages,
    k_scales=k_scales,
    v_scales=v_scales,
    tree_mask=_word_rows(tree_mask),
    sinks=_sink_rows(sinks, plan),
  )
  out, lse, parts = _call(plan, chip, inputs)
  if parts:
    out, lse = _with_shared_decode(plan, out, lse, *parts)
  of_token = lambda x: x.reshape(q.shape[0], plan.rows, -1)[:, : q.shape[1]]
  if not return_lse:
    return of_token(out)
  is_row = jnp.arange(q.shape[0]) < query_start[-1]
  lse = of_token(lse[:, :1])[..., 0]
  return of_token(out), jnp.where(is_row[:, None], lse, 0)


def append_and_attend(
  q,
  k_new,
  v_new,
  k_pages,
  v_pages,
  layer,
  query_start,
  kv_len,
  page_table,
  window=None,
  sinks=None,
  k_scales=None,
  v_scales=None,
  tree_mask=None,
  **static,
):
  """`ragged_paged_attention` after storing the queries' own keys and values.

  Two kernels, one after the other. `k_new` and `v_new` are [T, K, H].

  Returns:
    The result, the pools and, of quantised pages, their scales (or `None`).
  """
  slot = _slots(q.shape[0], k_pages.shape[3], query_start, kv_len, page_table)
  pools = dispatch(
    'kv_update',
    *(k_pages, v_pages, layer, slot, k_new, v_new, k_scales, v_scales),
  )
  k_pages, v_pages, k_scales, v_scales = pools
  out = ragged_paged_attention(
    *(q, k_pages, v_pages, layer, query_start, kv_len, page_table, window),
    *(sinks, k_scales, v_scales, tree_mask),
    **static,
  )
  return out, *pools


def _slots(num_tokens, page_size, query_start, kv_len, page_table):
  """Where each query's key is; -1 for those of no sequence."""
  rows = jnp.arange(num_tokens)
  seq = jnp.searchsorted(query_start[1:], rows, side='right')
  is_row = seq < kv_len.shape[0]
  seq = jnp.minimum(seq, kv_len.shape[0] - 1)
  position = kv_len[seq] - query_start[seq + 1] + rows
  page = page_table[seq, position // page_size]
  return jnp.where(is_row, page * page_size + position % page_size, -1)


def _check(q, k_pages, k_scales, tree_mask):
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(f'queries of {q.dtype}')
  page_size, head_dim = k_pages.shape[3:]
  if page_size & (page_size - 1) or page_size < 4:
    raise NotImplementedError(f'{page_size=} is not a power of two from 4 on')
  if head_dim > _LANES and head_dim % _LANES:
    raise NotImplementedError(f'{head_dim=} is not a multiple of 128')
  if tree_mask is not None and tree_mask.shape[1] > _TREE_WORDS:
    raise NotImplementedError(f'more than {_TREE_WORDS} words of tree mask')


def _params(layer, window):
  values = [layer, _NO_WINDOW if window is None else window]
  return jnp.concatenate([jnp.ravel(jnp.asarray(x, jnp.int32)) for x in values])


def _head_rows(q, plan):
  """[T * heads of a token in whole tiles, H]."""
  pad = (0, 0), (0, plan.rows - plan.num_heads), (0, 0)
  return jnp.pad(q, pad).reshape(-1, plan.head_dim)


def _table_rows(page_table, plan):
  pad = plan.table_rows * plan_lib.TABLE_ROW - page_table.shape[1]
  table = jnp.pad(page_table.astype(jnp.int32), ((0, 0), (0, pad)))
  return table.reshape(-1, 1, plan_lib.TABLE_ROW)


def _word_rows(tree_mask):
  if tree_mask is None:
    return None
  rows = ((0, 0), (0, plan_lib.WORD_ROWS - 1), (0, _LANES - tree_mask.shape[1]))
  return jnp.pad(tree_mask[:, None], rows).reshape(-1, _LANES)


def _sink_rows(sinks, plan):
  if sinks is None:
    return None
  pad = 0, plan.rows - plan.num_heads
  rows = jnp.pad(sinks.astype(jnp.float32) * math.log2(math.e), pad)
  return jnp.broadcast_to(rows[:, None], (plan.rows, _LANES))


def _in_hbm(x):
  """Keeps XLA from moving a small pool to VMEM, whence copies are slow."""
  if not isinstance(x, jax.core.Tracer):
    return x  # The constraint is one of programs.
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _with_shared_decode(plan, out, lse, outs, lses):
  """Puts the parts of the decode that two cores shared, if any, together."""
  outs = outs.reshape(plan.cores, plan.rows, -1)
  lses = lses.reshape(plan.cores, plan.rows, -1)
  merged = online_softmax.merge(outs[0], lses[0, :, 0], outs[1], lses[1, :, 0])
  token = lses[0, 0, decode.TOKEN_LANE].astype(jnp.int32)
  start = jnp.maximum(token, 0) * plan.rows

  def put(x, rows):
    rows = jnp.broadcast_to(rows.astype(x.dtype), (plan.rows, x.shape[1]))
    old = lax.dynamic_slice_in_dim(x, start, plan.rows)
    rows = jnp.where(token >= 0, rows, old)
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0)

  out = put(out, merged[0])
  return out, None if lse is None else put(lse, merged[1][:, None])


def _call(plan, chip, inputs):
  """Rows of heads; their log-sum-exp or `None`; the parts of a decode."""
  inputs = {name: x for name, x in inputs.items() if x is not None}
  values = varying.vary_alike(*inputs.values())
  inputs = {
    name: _in_hbm(x) if name.endswith(('_pages', '_scales')) else x
    for name, x in zip(inputs, values, strict=True)
  }
  q = inputs['q']
  vectors = plan_lib.scratch(plan, q.dtype, inputs['k_pages'].dtype)
  dma = pltpu.SemaphoreType.DMA
  scratch = dict(
    items=pltpu.SMEM((plan.ring, len(stream.FIELDS)), jnp.int32),
    pending=pltpu.SMEM((2,), jnp.int32),
    table=pltpu.SMEM((plan.ring * plan_lib.TABLE_ROW,), jnp.int32),
    table_sem=dma((plan.ring,)),
    query_sem=dma((plan.buffers,)),
    page_sem=dma((plan.buffers,)),
    result_sem=dma((2,)),
    **{name: pltpu.VMEM(*v) for name, v in vectors.items()},
  )
  results = _results(plan, q)
  in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
  names = [*inputs, *results, *scratch]

  def kernel(*refs):
    ragged_paged_attention_kernel(
      types.SimpleNamespace(**dict(zip(names, refs, strict=True))), plan
    )

  out = pl.pallas_call(
    kernel,
    name='ragged_paged_attention',
    out_shape=list(results.values()),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(plan.cores,),
      in_specs=[
        in_vmem if name == 'sinks' else in_hbm for name in list(inputs)[3:]
      ],
      out_specs=[in_hbm] * len(results),
      scratch_shapes=list(scratch.values()),
    ),
    # Rows of no sequence stay as they are.
    input_output_aliases={4: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',),
      vmem_limit_bytes=chip.vmem_bytes,
      # Of several instructions per copy; page numbers are the caller's.
      disable_bounds_checks=True,
    ),
  )(*inputs.values())
  found = dict(zip(results, out, strict=True))
  names = ('part_outs', 'part_lses') if plan.shares_decode else ()
  return found['out'], found.get('lse'), [found[name] for name in names]


def _results(plan, q):
  results = dict(out=varying.shape(q.shape, q.dtype, q))
  if plan.return_lse:
    shape = q.shape[0], _LANES
    results['lse'] = varying.shape(shape, jnp.float32, q)
  if plan.shares_decode:
    for name, width in ('part_outs', plan.head_dim), ('part_lses', _LANES):
      shape = plan.cores * plan.rows, width
      results[name] = varying.shape(shape, jnp.float32, q)
  return results


def ragged_paged_attention_kernel(refs, plan):
  """Runs the stream: items are known, then fetched, then computed."""
  for slot in range(2):
    refs.pending[slot] = 0
  share = stream.share_of_core(refs, plan)
  if plan.shares_decode:
    decode.clear_part(refs)
  cursor = (*share[0], jnp.int32(0))
  for i in range(plan.buffers):
    cursor = stream.generate(refs, plan, jnp.int32(i), cursor, share)
  for i in range(plan.buffers - 1):
    stream.fetch(refs, plan, jnp.int32(i))

  def step(state):
    i, _, *cursor = state
    cursor = stream.generate(refs, plan, i + plan.buffers, cursor, share)
    stream.fetch(refs, plan, i + plan.buffers - 1)
    _attend(refs, plan, i)
    following = stream.load_item(refs, plan, i + 1)
    return i + 1, following.count, *cursor

  count = stream.load_item(refs, plan, jnp.int32(0)).count
  jax.lax.while_loop(
    lambda state: state[1] > 0, step, (jnp.int32(0), count, *cursor)
  )
  for slot in range(2):
    stream.wait_for_results(refs, plan, slot)
  if plan.shares_decode:
    stream.write_part(refs, plan)


def _attend(refs, plan, i):
  """Computes item `i`: waits for it, and hands out the result of a tile."""
  item = stream.load_item(refs, plan, i)
  is_decode = (item.count == 1) & (plan.tree_words == 0)
  is_first, is_last = item.is_first == 1, item.is_last == 1

  @pl.when(is_first)
  def _():
    stream.wait_for_queries(refs, plan, item)
    pl.when(is_decode)(lambda: decode.begin(refs, plan, item))
    pl.when(~is_decode)(lambda: tile.begin(refs, plan, item))

  stream.wait_for_pages(refs, plan, i, item)
  softmax.clear_stale(refs, plan, i, item)
  if plan.has_scales:
    softmax.flatten_scales(refs, plan, i, item)
  pl.when(is_decode)(lambda: decode.step(refs, plan, i, item))
  pl.when(~is_decode)(lambda: tile.step(refs, plan, i, item))

  if plan.shares_decode:
    is_part = item.part != stream.WHOLE
    pl.when(is_last & is_part)(lambda: decode.end_part(refs, plan, item))
    is_last &= ~is_part

  @pl.when(is_last)
  def _():
    stream.wait_for_results(refs, plan, lax.rem(item.tile, 2))
    pl.when(is_decode)(lambda: decode.end(refs, plan, item))
    pl.when(~is_decode)(lambda: tile.end(refs, plan, item))
    stream.start_results(refs, plan, item)
