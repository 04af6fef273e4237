"""Puts the parts of tiles together that several workers have computed.

Dao et al., "Flash-Decoding for long-context inference",
https://pytorch.org/blog/flash-decoding/, step 3: parts of the keys are weighted
by their log-sum-exps.
"""

import functools
import math
import types

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import varying
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.ragged_paged_attention import pallas_gpu_stream as stream
from pallas_kernels.ragged_paged_attention.pallas_gpu_plan import FIELDS
from pallas_kernels.ragged_paged_attention.pallas_gpu_plan import Plan

# Columns of a block, and parts that it reads at a time.
_WIDTH = 32
_AT_ONCE = 4
_START = -1e30


def merge(
  plan: Plan,
  work: jax.Array,
  runs: jax.Array,
  part_out: jax.Array,
  part_lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One block per worker, for the tile that began before its run, if it is the
  first worker of which that is so.

  Args:
    plan: Of the kernel that computed the parts.
    work: See `pallas_gpu_plan.work`.
    runs: As above.
    part_out: Two halves of float32, to be added: rows `[2 * workers, consumers,
      2, 64]` of H bfloat16, one after the other.
    part_lse: Their log-sum-exps, base 2, `[2 * workers, consumers, 64]`.

  Returns:
    Rows `[workers, consumers, 64]` of these tiles, and their log-sum-exps;
    anything for the other workers.
  """
  workers, consumers, h = plan.workers, plan.consumers, plan.head_dim
  rows = workers, consumers, ROWS
  kernel = hopper.kernel(
    functools.partial(_body, plan=plan),
    name='ragged_paged_attention_merge',
    out=(
      varying.shape((math.prod(rows), h), jnp.float32, part_out),
      varying.shape(rows, jnp.float32, part_out),
    ),
    grid=dict(worker=workers, consumer=consumers, part=h // _WIDTH),
    scratch=[
      hopper.tile((_AT_ONCE, 2, ROWS, _WIDTH), jnp.bfloat16),
      plgpu.SMEM((_AT_ONCE, ROWS), jnp.float32),
      plgpu.SMEM((ROWS, _WIDTH), jnp.float32),
      plgpu.SMEM((ROWS,), jnp.float32),
      plgpu.Barrier(num_arrivals=3 * _AT_ONCE),
    ],
  )
  return kernel(work, runs, part_out, part_lse)


def place(
  plan: Plan,
  work: jax.Array,
  runs: jax.Array,
  out: jax.Array,
  lse: jax.Array | None,
  merged: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
  """Puts merged rows among the others.

  Args:
    plan: Of the kernels.
    work: See `pallas_gpu_plan.work`.
    runs: As above.
    out: Results, a row per token and head.
    lse: Their log-sum-exps of base 2, by tiles, or `None`.
    merged: What `merge` returns.

  Returns:
    All rows, and their natural log-sum-exps, one after the other.
  """
  p = plan
  run_W, number_W = runs.reshape(-1, 2)[:-1].T
  fields = work.reshape(-1, len(FIELDS))
  before_W = jnp.concatenate([run_W[:1], run_W[:-1]])
  starts = fields[:, FIELDS.index('start')]
  is_merged_W = is_merged(
    run_W, before_W, starts[number_W], starts[number_W + 1]
  )
  row, is_row = _rows(p, fields[number_W])
  is_row &= is_merged_W[:, None, None]
  # Different ones outside, for these are said to be.
  none = out.shape[0] + jnp.arange(row.size).reshape(row.shape)
  row = jnp.where(is_row, row, none).reshape(-1)
  put = lambda x, y: x.at[row].set(
    y.reshape(row.size, *x.shape[1:]).astype(x.dtype),
    mode='drop',
    unique_indices=True,
  )
  out = put(out, merged[0])
  if lse is None:
    return out, None
  row_A, is_row_A = _rows(p, fields[:-1])
  none = out.shape[0] + jnp.arange(row_A.size).reshape(row_A.shape)
  row_A = jnp.where(is_row_A, row_A, none).reshape(-1)
  flat = jnp.zeros(out.shape[0], jnp.float32)
  flat = flat.at[row_A].set(lse.reshape(-1), mode='drop', unique_indices=True)
  return out, put(flat, merged[1]) * math.log(2)


def _rows(plan, fields_A):
  """`[A, consumers, 64]`: row of the results, and whether it is a tile's."""
  p = plan
  begin, end, unit = (
    fields_A[:, FIELDS.index(name), None, None]
    for name in ('begin', 'end', 'unit')
  )
  consumer, row = jnp.arange(p.consumers)[:, None], jnp.arange(ROWS)
  mine = begin + consumer * p.queries
  first = jnp.minimum(mine, p.num_tokens - p.queries)
  token = first + row // p.unit
  is_row = (row < p.queries * p.unit) & (token >= mine)
  is_row &= token < jnp.minimum(mine + p.queries, end)
  return token * p.num_heads + unit * p.unit + row % p.unit, is_row


def is_merged(begin, before, tile_start, tile_end):
  """Whether the tile that a worker begins in is for its block to merge.

  Args:
    begin: First chunk of the worker.
    before: First chunk of the worker before it.
    tile_start: First chunk of the tile.
    tile_end: First chunk of the next one.
  """
  is_inside = (begin > tile_start) & (begin < tile_end)
  return is_inside & (before <= tile_start)


def _body(work, runs, part_out, part_lse, out, lse, *smem, plan):
  _, _, out_smem, lse_smem, _ = smem
  worker = lax.axis_index('worker')
  consumer = lax.axis_index('consumer')
  columns = pl.ds(lax.axis_index('part') * _WIDTH, _WIDTH)
  refs = types.SimpleNamespace(
    work=work, runs=runs, part_out=part_out, part_lse=part_lse
  )
  begin, _, number = stream.load_run(refs, worker)
  before, size, _ = stream.load_run(refs, jnp.maximum(worker - 1, 0))
  size -= before
  tile = stream.load_tile(refs, number)

  @pl.when(is_merged(begin, before, tile.start, tile.next_start))
  def _():
    count = 1 + lax.div(tile.next_start - begin + size - 1, size)
    # The worker before has begun the tile, with its run or after.
    first = 2 * (worker - 1) + (before < tile.start)

    step = functools.partial(
      _step, refs, plan, smem, (worker, consumer, columns, first, count)
    )
    full = lambda value: plgpu.layout_cast(
      jnp.full(ROWS, value, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
    )
    zeros = jnp.zeros((ROWS, _WIDTH), jnp.float32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    m, l, acc = lax.fori_loop(
      0,
      lax.div(count + _AT_ONCE - 1, _AT_ONCE),
      step,
      (full(_START), full(0.0), zeros),
    )
    out_smem[...] = acc * _wide(1 / jnp.where(l == 0, 1.0, l))
    lse_smem[...] = jnp.where(l == 0, -jnp.inf, m + jnp.log(l) * hopper.LOG2_E)
    plgpu.commit_smem()
    row = (worker * plan.consumers + consumer) * ROWS
    plgpu.copy_smem_to_gmem(out_smem, out.at[pl.ds(row, ROWS), columns])

    @pl.when(lax.axis_index('part') == 0)
    def _():
      plgpu.copy_smem_to_gmem(lse_smem, lse.at[worker, consumer])

    plgpu.wait_smem_to_gmem(0)


def _step(refs, plan, smem, at, i, carry):
  worker, consumer, columns, first, count = at
  outs, lses, _, _, ready = smem
  m, l, acc = carry
  found = []
  for j in range(_AT_ONCE):
    # The last one again, without weight.
    k = jnp.minimum(i * _AT_ONCE + j, count - 1)
    part = jnp.where(k == 0, first, 2 * (worker - 1 + k))
    for half in range(2):
      row = ((part * plan.consumers + consumer) * 2 + half) * ROWS
      plgpu.copy_gmem_to_smem(
        refs.part_out.at[pl.ds(row, ROWS), columns], outs.at[j, half], ready
      )
    plgpu.copy_gmem_to_smem(refs.part_lse.at[part, consumer], lses.at[j], ready)
  plgpu.barrier_wait(ready)
  for j in range(_AT_ONCE):
    x = sum(
      plgpu.layout_cast(outs[j, half], plgpu.Layout.WGMMA).astype(jnp.float32)
      for half in range(2)
    )
    y = plgpu.layout_cast(lses[j], plgpu.Layout.WGMMA.reduce(1))
    is_one = i * _AT_ONCE + j < count
    found.append((x, y + jnp.where(is_one, 0.0, -jnp.inf)))
  best = functools.reduce(jnp.maximum, [y for _, y in found], m)
  fade = jnp.exp2(m - best)
  l, acc = l * fade, acc * _wide(fade)
  for x, y in found:
    weight = jnp.exp2(y - best)
    l, acc = l + weight, acc + x * _wide(weight)
  return best, l, acc


def _wide(x):
  return lax.broadcast_in_dim(x, (ROWS, _WIDTH), (0,))
