"""A tile of ragged paged attention on a GPU: 64 rows, and chunks of keys.

Rows are queries times heads. In a decode these are the heads of several kv
heads, and columns are the keys of all of these: a row's products with keys of
another head are masked. The rows of a WGMMA that a decode would leave empty do
it for nothing, and pages are copied whole.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common.hopper import LOG2_E
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.ragged_paged_attention.pallas_gpu_plan import Plan

# Of the running maximum before any key. Finite: an infinite one, subtracted
# from itself, is no number.
_START = -1e30
# Columns to move at a time: few registers, and few ways to lay them out.
_WIDTH = 64
_MOST_16 = float(jnp.finfo(jnp.float16).max)
_OF_ROWS = plgpu.Layout.WGMMA.reduce(1)


class Place(NamedTuple):
  """Which of the computing warpgroups this is.

  Attributes:
    worker: Its number among all.
    stream: Of the block.
    consumer: Of the worker.
  """

  worker: jax.Array
  stream: jax.Array
  consumer: jax.Array


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
  for part in range(p.parts):
    x = plgpu.layout_cast(
      refs.staging[mine * p.parts + part], plgpu.Layout.WGMMA
    )
    if q.dtype == jnp.float16:
      x = jnp.clip(x.astype(jnp.float32), -_MOST_16, _MOST_16)
    q[:, pl.ds(part * p.width, p.width)] = x.astype(q.dtype)
  plgpu.commit_smem()
  first = p.first_token(tile.begin, place.consumer)

  def step(i, carry):
    chunk = tile.chunk + at - tile.start + i
    item = 2 * (at - begin + i)
    return _step(refs, p, place, tile, first, chunk, item, carry)

  full = lambda value: plgpu.layout_cast(
    jnp.full(ROWS, value, jnp.float32), _OF_ROWS
  )
  zeros = jnp.zeros((ROWS, p.width), jnp.float32)
  out = (plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),) * p.parts
  init = full(_START), full(0.0), out
  m, l, out = lax.fori_loop(0, stop - at, step, init)
  inverse = 1 / jnp.where(l == 0, 1.0, l)
  out = [x * _wide(inverse, x.shape) for x in out]
  # In base 2.
  lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(l) * LOG2_E)

  is_whole = (at == tile.start) & (stop == tile.next_start)
  refs.row_lse[mine] = lse
  # Of a worker's run the first tile may begin before, the last end after.
  part = 2 * place.worker + (at > begin)
  pl.when(is_whole)(lambda: _store(refs, p, tile, mine, number, place, out))
  pl.when(~is_whole)(lambda: _store_part(refs, p, mine, part, place, out))
  plgpu.barrier_arrive(refs.answered.at[place.stream])


def _store(refs, plan, tile, mine, number, place, out):
  """Writes the rows of the queries that are the tile's."""
  p = plan
  for i, x in enumerate(out):
    refs.staging[mine * p.parts + i] = x.astype(refs.staging.dtype)
  plgpu.commit_smem()
  first = p.first_token(tile.begin, place.consumer)
  begin = tile.begin + place.consumer * p.queries
  end = jnp.minimum(begin + p.queries, tile.end)

  @pl.loop(begin - first, end - first)
  def _(i):
    row = (first + i) * p.num_heads + tile.unit * p.unit
    for part in range(p.parts):
      plgpu.copy_smem_to_gmem(
        refs.staging.at[mine * p.parts + part, pl.ds(i * p.unit, p.unit)],
        refs.out.at[pl.ds(row, p.unit), pl.ds(part * p.width, p.width)],
      )

  if p.return_lse:
    plgpu.copy_smem_to_gmem(
      refs.row_lse.at[mine], refs.lse.at[number, place.consumer]
    )
  plgpu.wait_smem_to_gmem(0)


def _store_part(refs, plan, mine, part, place, out):
  """Writes all rows, for `pallas_gpu_merge`."""
  p = plan
  # Halves of float32 numbers, for which there is room.
  for half in range(2):
    for i, x in enumerate(out):
      value = x.astype(refs.staging.dtype)
      if half:
        value = (x - value.astype(jnp.float32)).astype(value.dtype)
      refs.staging[mine * p.parts + i] = value
    plgpu.commit_smem()
    row = ((part * p.consumers + place.consumer) * 2 + half) * ROWS
    for i in range(p.parts):
      plgpu.copy_smem_to_gmem(
        refs.staging.at[mine * p.parts + i],
        refs.part_out.at[pl.ds(row, ROWS), pl.ds(i * p.width, p.width)],
      )
    plgpu.wait_smem_to_gmem(0)
  plgpu.copy_smem_to_gmem(
    refs.row_lse.at[mine], refs.part_lse.at[part, place.consumer]
  )
  plgpu.wait_smem_to_gmem(0)


def _step(refs, plan, place, tile, first, chunk, item, carry):
  """Milakov & Gimelshein, https://arxiv.org/abs/1805.02867, algorithm 3."""
  p = plan
  m, l, out = carry
  mine = place.stream * p.consumers + place.consumer
  shape = ROWS, p.columns
  slots = [place.stream * p.slots + lax.rem(item + x, p.slots) for x in (0, 1)]

  plgpu.barrier_wait(refs.full.at[slots[0]])
  keys = refs.ring.at[slots[0]]
  if p.has_scales:
    k_scale = _widen(refs, p, mine, slots[0])
    keys = refs.wide.at[mine]

  def logits(acc):
    plgpu.wgmma(acc, refs.queries.at[mine], keys.T)
    return acc[...]

  s = pl.run_scoped(logits, plgpu.ACC(shape, jnp.float32))
  factor = p.scale * LOG2_E
  if p.has_scales:
    s *= _wide(k_scale, shape, 1)
  else:
    plgpu.barrier_arrive(refs.empty.at[slots[0]])
  if p.soft_cap is not None:
    # tanh, exact where it is small too, unlike the unit for it.
    s = 1 - 2 / (jnp.exp2(s * (2 * factor / p.soft_cap)) + 1)
    factor = p.soft_cap * LOG2_E
  s = _masked(refs, p, mine, tile, first, chunk, s)

  best = jnp.maximum(m, s.max(axis=1) * factor)
  fade = jnp.exp2(m - best)
  weights = jnp.exp2(s * factor - _wide(best, shape))
  l = l * fade + weights.sum(axis=1)

  plgpu.barrier_wait(refs.full.at[slots[1]])
  values = refs.ring.at[slots[1]]
  if p.has_scales:
    v_scale = _widen(refs, p, mine, slots[1])
    key, _ = _keys_of_columns(refs, p, mine)
    exists = key + chunk * p.chunk < tile.limit
    v_scale = jnp.where(exists, v_scale, jnp.zeros_like(v_scale))
    weights *= _wide(v_scale, shape, 1)
    values = refs.wide.at[mine]
  weights = weights.astype(refs.queries.dtype)
  _clear_stale(refs, p, place, tile, chunk, values)

  new = []
  for i, x in enumerate(out):
    columns = values.at[:, pl.ds(i * x.shape[1], x.shape[1])]

    def product(acc, columns=columns):
      plgpu.wgmma(acc, weights, columns)
      return acc[...]

    y = pl.run_scoped(product, plgpu.ACC(x.shape, jnp.float32))
    new.append(x * _wide(fade, x.shape) + y)
  if not p.has_scales:
    plgpu.barrier_arrive(refs.empty.at[slots[1]])
  return best, l, tuple(new)


def _widen(refs, plan, mine, slot):
  """Makes `wide` of a slot, frees it, and returns its scales."""
  p = plan
  for row in range(0, p.columns, ROWS):
    rows = pl.ds(row, ROWS)
    x = plgpu.layout_cast(refs.ring[slot, rows], plgpu.Layout.WGMMA_UPCAST_2X)
    refs.wide[mine, rows] = x.astype(refs.wide.dtype)
  scale = plgpu.layout_cast(refs.scales[slot], plgpu.Layout.WGMMA.reduce(0))
  plgpu.commit_smem()
  plgpu.barrier_arrive(refs.empty.at[slot])
  return scale


def _masked(refs, plan, mine, tile, first, chunk, s):
  """Logits, minus infinity for what a row does not see."""
  p = plan
  # Of the first key from the first row's query.
  distance = chunk * p.chunk - (first + tile.offset)

  def mask(s):
    # Along one axis each: few numbers, that a thread's logits share.
    key, head = _keys_of_columns(refs, p, mine)
    row = _iota(ROWS, 0)
    query = lax.div(row, jnp.int32(p.unit))
    ahead = _wide(key + distance, s.shape, 1)
    seen = ahead <= _wide(query, s.shape)
    if p.has_window:
      seen &= ahead > _wide(query - tile.window, s.shape)
    if p.heads > 1:
      own = lax.div(row - query * p.unit, jnp.int32(p.group))
      seen &= _wide(own, s.shape) == _wide(head, s.shape, 1)
    return jnp.where(seen, s, -jnp.inf)

  if p.heads > 1:
    return mask(s)
  is_whole = distance + p.chunk - 1 <= 0
  if p.has_window:
    is_whole &= distance > p.queries - 1 - tile.window
  return lax.cond(is_whole, lambda s: s, mask, s)


def _clear_stale(refs, plan, place, tile, chunk, values):
  """Zeros for values past the last one: what is there may be no number."""
  p = plan

  @pl.when((chunk + 1) * p.chunk > tile.limit)
  def _():
    # Warpgroups that share the slot take turns, a few registers at a time.
    is_shared = p.consumers > 1 and not p.has_scales
    size = (p.consumers if is_shared else 1) * ROWS
    for start in range(0, p.columns, size):
      row = start + (place.consumer * ROWS if is_shared else 0)

      @pl.when(row < p.columns)
      def _(row=row):
        for column in range(0, p.head_dim, _WIDTH):
          part = values.at[pl.ds(row, ROWS), pl.ds(column, _WIDTH)]
          key, _ = _keys(p, ROWS, 0, row)
          exists = _wide(key + chunk * p.chunk, part.shape) < tile.limit
          x = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
          part[...] = jnp.where(exists, x, jnp.zeros_like(x))

    plgpu.commit_smem()
    if is_shared:
      cleared = refs.cleared.at[place.stream]
      plgpu.barrier_arrive(cleared)
      plgpu.barrier_wait(cleared)


def begin(refs: Any, plan: Plan, place: Place) -> None:
  """Writes what `_masked` reads."""
  mine = place.stream * plan.consumers + place.consumer
  refs.places[mine] = _iota(plan.columns, 1)
  plgpu.commit_smem()


def _keys_of_columns(refs, plan, mine):
  """`_keys` of a slot."""
  if plan.heads > 1:
    # Known when it is compiled, they spare half of the exponentials: a thread
    # has rows of some heads and no others.
    return _keys(plan, plan.columns, 1)
  # From memory: what the compiler knows takes registers all the time.
  layout = plgpu.Layout.WGMMA.reduce(0)
  return plgpu.layout_cast(refs.places[mine], layout), None


def _keys(plan, size, axis, start=0):
  """Key of its head, and head, of each place of a slot, laid along an axis."""
  p = plan
  place = _iota(size, axis) + start
  if p.heads == 1:
    return place, None
  # All sizes are powers of two.
  shift = p.part_keys.bit_length() - 1
  shift_heads = shift + p.heads.bit_length() - 1
  part = place & (p.part_keys - 1)
  head = (place >> shift) & (p.heads - 1)
  return ((place >> shift_heads) << shift) + part, head


def _iota(size, axis):
  layout = plgpu.Layout.WGMMA.reduce(1 - axis)
  return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def _wide(x, shape, axis=0):
  """A vector as `shape`, of which it is one axis."""
  return lax.broadcast_in_dim(x, shape, (axis,))
