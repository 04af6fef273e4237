"""A tile of ragged paged attention on a GPU: 64 rows, and chunks of keys.

Rows are queries times heads. In a decode these are the heads of several kv
heads, and columns are the keys of all of these: a row's products with keys of
another head are masked. The rows of a WGMMA that a decode would leave empty do
it for nothing, and pages are copied whole.
"""

from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common.hopper import LOG2_E
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.ragged_paged_attention import (
  pallas_gpu_stream as stream_lib,
)
from pallas_kernels.ragged_paged_attention.pallas_gpu_plan import Plan

# Of the running maximum before any key. Finite: an infinite one, subtracted
# from itself, is no number.
_START = -1e30
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)


class Place(NamedTuple):
  """Which of the computing warpgroups this is.

  Attributes:
    worker: Its number among all.
    stream: Of the block.
    consumer: Of the worker.
  """

  worker: jax.Array
  stream: int
  consumer: int


def attend(
  refs: Any,
  plan: Plan,
  place: Place,
  number: jax.Array,
  tile: Any,
  at: jax.Array,
  stop: jax.Array,
  begin: jax.Array,
) -> None:
  """Attends to the chunks `at .. stop - 1` of the row of all chunks.

  Args:
    refs: Arrays and shared memory.
    plan: Of the kernel.
    place: Of this warpgroup.
    number: Of the tile.
    tile: Its numbers.
    at: First chunk.
    stop: End of the chunks.
    begin: First chunk of the worker.
  """
  p = plan
  mine = place.stream * p.consumers + place.consumer
  plgpu.barrier_wait(refs.asked.at[place.stream])
  q = refs.queries.at[mine]
  q[...] = plgpu.layout_cast(refs.staging[mine], plgpu.Layout.WGMMA)
  plgpu.commit_smem()
  first = stream_lib.first_token(p, tile.begin, place.consumer)

  def step(i, carry):
    chunk = tile.chunk + at - tile.start + i
    item = 2 * (at - begin + i)
    return _step(refs, p, place, tile, first, chunk, item, carry)

  full = lambda value: plgpu.layout_cast(
    jnp.full(ROWS, value, jnp.float32), _OF_ROWS
  )
  out = plgpu.layout_cast(
    jnp.zeros((ROWS, p.head_dim), jnp.float32), plgpu.Layout.WGMMA
  )
  init = full(_START), full(0.0), out
  m, l, out = lax.fori_loop(0, stop - at, step, init)
  out *= _wide(1 / jnp.where(l == 0, 1.0, l), out.shape)
  # In base 2.
  lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(l) * LOG2_E)

  is_whole = (at == tile.start) & (stop == tile.next_start)

  @pl.when(is_whole)
  def _():
    refs.staging[mine] = out.astype(refs.staging.dtype)
    if p.return_lse:
      refs.row_lse[mine] = lse
    plgpu.commit_smem()
    _store(refs, p, tile, mine, first, place.consumer)
    if p.return_lse:
      plgpu.copy_smem_to_gmem(
        refs.row_lse.at[mine], refs.lse.at[number, place.consumer]
      )
    plgpu.wait_smem_to_gmem(0)

  @pl.when(~is_whole)
  def _():
    # Of a worker's run the first tile may begin before, the last end after.
    part = 2 * place.worker + (at > begin)
    refs.row_lse[mine] = lse
    # Halves of float32 numbers, for which there is room.
    rest = out
    for half in range(2):
      value = rest.astype(refs.staging.dtype)
      rest -= value.astype(jnp.float32)
      refs.staging[mine] = value
      plgpu.commit_smem()
      row = ((part * p.consumers + place.consumer) * 2 + half) * ROWS
      plgpu.copy_smem_to_gmem(
        refs.staging.at[mine], refs.part_out.at[pl.ds(row, ROWS)]
      )
      plgpu.wait_smem_to_gmem(0)
    plgpu.copy_smem_to_gmem(
      refs.row_lse.at[mine], refs.part_lse.at[part, place.consumer]
    )
    plgpu.wait_smem_to_gmem(0)

  plgpu.barrier_arrive(refs.answered.at[place.stream])


def _store(refs, plan, tile, mine, first, consumer):
  """Writes the rows of the queries that are the tile's."""
  p = plan
  begin = tile.begin + consumer * p.queries
  end = jnp.minimum(begin + p.queries, tile.end)

  @pl.loop(0, p.queries)
  def _(i):
    token = first + i

    @pl.when((token >= begin) & (token < end))
    def _():
      row = token * p.num_heads + tile.unit * p.unit
      plgpu.copy_smem_to_gmem(
        refs.staging.at[mine, pl.ds(i * p.unit, p.unit)],
        refs.out.at[pl.ds(row, p.unit)],
      )


def _step(refs, plan, place, tile, first, chunk, item, carry):
  """Milakov & Gimelshein, https://arxiv.org/abs/1805.02867, algorithm 3."""
  p = plan
  m, l, out = carry
  mine = place.stream * p.consumers + place.consumer
  shape = ROWS, p.columns
  slots = [place.stream * p.slots + lax.rem(item + x, p.slots) for x in (0, 1)]

  def logits(acc):
    plgpu.wgmma(acc, refs.queries.at[mine], refs.ring.at[slots[0]].T)
    return acc[...]

  plgpu.barrier_wait(refs.full.at[slots[0]])
  s = pl.run_scoped(logits, plgpu.ACC(shape, jnp.float32))
  plgpu.barrier_arrive(refs.empty.at[slots[0]])
  factor = p.scale * LOG2_E
  if p.soft_cap is not None:
    # tanh, exact where it is small too, unlike the unit for it.
    s = 1 - 2 / (jnp.exp2(s * (2 * factor / p.soft_cap)) + 1)
    factor = p.soft_cap * LOG2_E
  s = _masked(refs, p, tile, first, chunk, s)

  best = jnp.maximum(m, s.max(axis=1) * factor)
  fade = jnp.exp2(m - best)
  weights = jnp.exp2(s * factor - _wide(best, shape))
  l = l * fade + weights.sum(axis=1)
  weights = weights.astype(refs.queries.dtype)

  plgpu.barrier_wait(refs.full.at[slots[1]])
  values = refs.ring.at[slots[1]]
  _clear_stale(refs, p, place, tile, chunk, values)

  def product(acc):
    plgpu.wgmma(acc, weights, values)
    return acc[...]

  acc = plgpu.ACC((ROWS, p.head_dim), jnp.float32)
  new = pl.run_scoped(product, acc)
  plgpu.barrier_arrive(refs.empty.at[slots[1]])
  return best, l, out * _wide(fade, out.shape) + new


def _masked(refs, plan, tile, first, chunk, s):
  """Logits, minus infinity for what a row does not see."""
  p = plan
  # Of the first row; d tokens later are `d * unit` rows below.
  distance = chunk * p.chunk - (first + tile.offset)

  def mask(s):
    key, head = _keys(p, s.shape, 1)
    row = _iota(s.shape, 0)
    ahead = (key + distance) * p.unit
    seen = ahead <= row
    if p.has_window:
      window = refs.params[stream_lib.WINDOW]
      seen &= ahead + window * p.unit > row
    if p.heads > 1:
      own = lax.div(lax.rem(row, p.unit), p.group)
      seen &= own == head
    return jnp.where(seen, s, -jnp.inf)

  if p.heads > 1:
    return mask(s)
  is_whole = distance + p.chunk - 1 <= 0
  if p.has_window:
    window = refs.params[stream_lib.WINDOW]
    is_whole &= distance > p.queries - 1 - window
  return lax.cond(is_whole, lambda s: s, mask, s)


def _clear_stale(refs, plan, place, tile, chunk, values):
  """Zeros for values past the last one: what is there may be no number."""
  p = plan

  @pl.when((chunk + 1) * p.chunk > tile.limit)
  def _():
    # Each warpgroup that shares the slot has its rows of it.
    rows = p.columns // p.consumers
    mine = values.at[pl.ds(place.consumer * rows, rows)]
    shape = rows, p.head_dim
    key, _ = _keys(p, shape, 0, place.consumer * rows)
    exists = key + chunk * p.chunk < tile.limit
    x = plgpu.layout_cast(mine[...], plgpu.Layout.WGMMA)
    mine[...] = jnp.where(exists, x, jnp.zeros_like(x))
    plgpu.commit_smem()
    if p.consumers > 1:
      cleared = refs.cleared.at[place.stream]
      plgpu.barrier_arrive(cleared)
      plgpu.barrier_wait(cleared)


def _keys(plan, shape, axis, start=0):
  """Key of its head, and head, of each place of a slot along an axis."""
  p = plan
  place = _iota(shape, axis) + start
  if p.heads == 1:
    return place, None
  # All sizes are powers of two.
  part = lax.rem(place, p.part_keys)
  head = lax.rem(lax.div(place, p.part_keys), p.heads)
  copy = lax.div(place, p.part_keys * p.heads)
  return copy * p.part_keys + part, head


def _iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def _wide(x, shape):
  return lax.broadcast_in_dim(x, shape, (0,))
