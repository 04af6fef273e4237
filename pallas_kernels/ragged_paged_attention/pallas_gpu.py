"""ragged_paged_attention for Hopper GPUs: a stream of chunks, and a merge.

Prefill chunks, decodes and everything between in one call whose contents are
known only when it runs, as in Jiang et al., "Ragged Paged Attention",
https://arxiv.org/abs/2604.15464. Chunks of keys of all sequences form one row
that workers divide equally (`pallas_gpu_plan.work`); where that cuts a
sequence, its parts are merged by a second kernel as in Dao et al.,
"Flash-Decoding for long-context inference",
https://pytorch.org/blog/flash-decoding/. Both from memory, without the text.

A step with few queries per sequence has two workers in a block, each with its
ring, and a tile with the heads of several kv heads, so that a copy is 64 keys
side by side whatever the page size; one of prefill chunks has two warpgroups of
64 rows each that share the keys of one kv head. Quantised pages become 16 bits
on their way through registers, int8 bfloat16 and float8 float16, which is one
instruction for two values; scales join logits and weights.

Deviations: how a sequence is cut depends on the others in the step, so its sum
may be rounded differently. Of pages with positions only decodes are taken, as
on TPUs; float32, trees and int4 are declined, and scales of fewer than 32 keys
side by side (pages of 16 in prefill chunks). With float8 pages queries are made
float16: those beyond 65,504 are cut, below 6e-5 they lose bits.

*Cost*: HBM: K and V once per tile, in whole pages, of which a tile's last one
is copied as often as to fill its last chunk; q and the output once; parts, at
most two of 64 rows per warpgroup, written and read once. FLOPs: 4 N H per query
and key in whole chunks; of a decode, 64 rows per tile whatever it has.
Launches: the kernel, the merge, and nine small ones of XLA that list the work
and put merged rows in their places; without a window of its own a layer shares
the list with the others of its scan. Sinks, log-sum-exps: one pass over the
output.
"""

from collections.abc import Mapping
import functools
import math
import types
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.ragged_paged_attention import pallas_gpu_merge as merge_lib
from pallas_kernels.ragged_paged_attention import pallas_gpu_plan as plan_lib
from pallas_kernels.ragged_paged_attention import pallas_gpu_stream as stream
from pallas_kernels.ragged_paged_attention import pallas_tpu_partial
from pallas_kernels.ragged_paged_attention.features import features

_QUANTISED = 'int8', 'float8_e4m3fn', 'float8_e5m2'


def candidates(chip_name: str, *args, **static) -> list[dict[str, Any]]:
  """Configurations worth trying."""
  del chip_name, args, static
  return [
    dict(columns=columns, slots=slots)
    for columns in (64, 128)
    for slots in (4, 6, 16)
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

  `config` may set 'columns', the keys of a slot, 'slots', the most of a ring,
  and 'blocks', of the grid.
  """
  _check(q, k_pages, k_scales, tree_mask, scale)
  pools, rows = (k_pages, v_pages, layer), (query_start, kv_len, page_table)
  run = functools.partial(
    _all_pages,
    k_scales=k_scales,
    v_scales=v_scales,
    scale=scale,
    soft_cap=soft_cap,
    return_lse=return_lse,
    config=config,
  )
  if kv_position is None:
    return run(q, *pools, *rows, window, sinks)
  # Nothing there is of a TPU: it makes of each query a sequence of its own.
  return pallas_tpu_partial.attend(
    run, q, *pools, (*rows, window), kv_position, sinks
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
  scale,
  soft_cap,
  return_lse,
  config,
):
  """All pages of the sequences, or all that count; a window of each, or one."""
  gpu = hopper.current()
  op = 'ragged_paged_attention'
  if config is None:
    config = tuned.lookup(op, gpu.name, features(q, k_pages))
  plan = plan_lib.plan_for(
    gpu,
    config,
    q,
    k_pages,
    page_table,
    scale=scale,
    soft_cap=soft_cap,
    has_window=window is not None,
    has_scales=k_scales is not None,
    return_lse=return_lse or sinks is not None,
  )
  num_tokens = q.shape[0]
  q = jnp.pad(q, ((0, plan.num_tokens - num_tokens), (0, 0), (0, 0)))
  if window is not None:
    window = jnp.minimum(window, plan_lib.NO_WINDOW).astype(jnp.int32)
  work, runs = plan_lib.work(plan, query_start, kv_len, window)
  inputs = dict(
    work=work,
    runs=runs,
    layer=jnp.asarray(layer, jnp.int32).reshape(1),
    pages=page_table.astype(jnp.int32).reshape(-1),
    q=q.reshape(-1, plan.head_dim),
    k=k_pages.reshape(-1, plan.head_dim),
    v=v_pages.reshape(-1, plan.head_dim),
  )
  if k_scales is not None:
    flat = lambda x: x.astype(jnp.float32).reshape(-1)
    inputs |= dict(k_scales=flat(k_scales), v_scales=flat(v_scales))
  out, lse = _call(plan, inputs)
  out = out.reshape(plan.num_tokens, plan.num_heads, -1)[:num_tokens]
  if not plan.return_lse:
    return out
  lse = lse.reshape(plan.num_tokens, plan.num_heads)[:num_tokens]
  is_row = jnp.arange(num_tokens)[:, None] < query_start[-1]
  if sinks is not None:
    out, lse = _with_sinks(out, jnp.where(is_row, lse, 0), sinks)
  return (out, jnp.where(is_row, lse, 0)) if return_lse else out


def _with_sinks(out, lse, sinks):
  """They join the denominator only, whatever the keys."""
  total = jnp.logaddexp(lse, sinks.astype(jnp.float32))
  return (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total


def _check(q, k_pages, k_scales, tree_mask, scale):
  pages, (page_size, head_dim) = k_pages.dtype, k_pages.shape[3:]
  if q.dtype != jnp.bfloat16:
    raise NotImplementedError(f'queries of {q.dtype}, not bfloat16')
  if k_scales is None and pages != q.dtype:
    raise NotImplementedError(f'pages of {pages} for queries of {q.dtype}')
  if k_scales is not None and pages.name not in _QUANTISED:
    raise NotImplementedError(f'pages of {pages}, not of {_QUANTISED}')
  if page_size & (page_size - 1) or page_size < 8:
    raise NotImplementedError(f'{page_size=} is not a power of two from 8 on')
  if head_dim not in (64, 128, 256):
    raise NotImplementedError(f'{head_dim=} is not 64, 128 or 256')
  if math.prod(k_pages.shape[:4]) >= 2**31:
    raise NotImplementedError(f'{k_pages.shape=} has too many keys to count')
  if tree_mask is not None:
    raise NotImplementedError('a tree of drafted tokens')
  if scale <= 0:
    raise NotImplementedError(f'{scale=} is not positive')


def _call(plan, inputs):
  """Rows of heads, and natural log-sum-exps or `None`."""
  values = varying.vary_alike(*inputs.values())
  inputs = dict(zip(inputs, values, strict=True))
  q, k = inputs['q'], inputs['k']
  f32 = jnp.float32
  rows = plan.consumers, ROWS
  parts = 4 * plan.workers * plan.consumers * ROWS
  out = dict(
    out=varying.shape(q.shape, q.dtype, q),
    part_out=varying.shape((parts, plan.head_dim), q.dtype, q),
    part_lse=varying.shape((2 * plan.workers, *rows), f32, q),
  )
  if plan.return_lse:
    tiles = plan.num_tiles * plan.units
    out['lse'] = varying.shape((tiles, *rows), f32, q)
  shapes = plan_lib.scratch(plan, q.dtype, k.dtype)
  flat = ('staging', 'row_lse', 'places', 'scales')
  scratch = {
    name: (plgpu.SMEM if name in flat else hopper.tile)(*shape)
    for name, shape in shapes.items()
  }
  scratch |= stream.barriers(plan)

  def body(*refs, **smem):
    names = zip([*inputs, *out], refs, strict=True)
    stream.kernel(types.SimpleNamespace(**dict(names), **smem), plan)

  kernel = hopper.kernel(
    body,
    name='ragged_paged_attention',
    out=tuple(out.values()),
    grid=dict(block=plan.blocks),
    scratch=scratch,
    warpgroups=plan.warpgroups,
  )
  found = dict(zip(out, kernel(*inputs.values()), strict=True))
  work, runs = inputs['work'], inputs['runs']
  merged = merge_lib.merge(
    plan, work, runs, found['part_out'], found['part_lse']
  )
  return merge_lib.place(
    plan, work, runs, found['out'], found.get('lse'), merged
  )
