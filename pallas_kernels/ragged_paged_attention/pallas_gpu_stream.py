"""The stream of ragged paged attention's kernel on a GPU: tiles and copies.

A worker is a copying warpgroup and one or two that compute. It takes a run of
chunks, which are parts of consecutive tiles (see `pallas_gpu_plan.work`): keys
and values go through one ring of slots, a slot of keys and one of values in
turn, and the ring does not end with a tile.
"""

import types
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import pallas_gpu_tile as tile_lib
from pallas_kernels.ragged_paged_attention.pallas_gpu_plan import FIELDS
from pallas_kernels.ragged_paged_attention.pallas_gpu_plan import Plan

# Of a thread of a copying and of a computing warpgroup, by warpgroups in all.
_REGISTERS = {3: (24, 240), 4: (40, 216)}
LAYER, WINDOW = range(2)


def barriers(plan: Plan) -> dict[str, plgpu.Barrier]:
  """Of a block, `streams` times so many as a stream needs."""
  p = plan
  ring = dict(num_barriers=p.streams * p.slots)
  one = dict(num_barriers=p.streams)
  copies = p.copies + p.has_scales
  made = dict(
    full=plgpu.Barrier(num_arrivals=copies, **ring),
    empty=plgpu.Barrier(num_arrivals=p.consumers, **ring),
    asked=plgpu.Barrier(num_arrivals=p.tile_queries, **one),
    answered=plgpu.Barrier(num_arrivals=p.consumers, **one),
  )
  if p.consumers > 1:
    made['cleared'] = plgpu.Barrier(num_arrivals=p.consumers, **one)
  return made


def load_tile(refs: Any, tile: jax.Array) -> types.SimpleNamespace:
  """The numbers of a tile, and where the next one starts."""
  at = tile * len(FIELDS)
  numbers = {name: refs.work[at + i] for i, name in enumerate(FIELDS)}
  next_start = refs.work[at + 2 * len(FIELDS) - 1]
  return types.SimpleNamespace(**numbers, next_start=next_start)


def load_run(refs: Any, worker: jax.Array) -> tuple[jax.Array, ...]:
  """First chunk, end, and first tile of a worker."""
  at = 2 * worker
  return refs.runs[at], refs.runs[at + 2], refs.runs[at + 1]


def first_token(plan: Plan, begin: jax.Array, consumer: int) -> jax.Array:
  """Of the rows of a warpgroup, all of which have to exist."""
  first = begin + consumer * plan.queries
  return jnp.minimum(first, plan.num_tokens - plan.queries)


def kernel(refs: Any, plan: Plan) -> None:
  """Runs the worker that this warpgroup belongs to."""
  wg = lax.axis_index('wg')
  block = lax.axis_index('block')
  size = 1 + plan.consumers
  copying, computing = _REGISTERS[plan.warpgroups]
  for stream in range(plan.streams):
    worker = block * plan.streams + stream
    run = load_run(refs, worker)

    @pl.when(wg == stream * size)
    def _(stream=stream, run=run):
      plgpu.set_max_registers(copying, action='decrease')
      _walk(refs, run, lambda *x: _copy(refs, plan, stream, *x))

    for consumer in range(plan.consumers):

      @pl.when(wg == stream * size + 1 + consumer)
      def _(stream=stream, run=run, worker=worker, consumer=consumer):
        plgpu.set_max_registers(computing, action='increase')
        for slot in range(plan.slots):
          plgpu.barrier_arrive(refs.empty.at[stream * plan.slots + slot])
        plgpu.barrier_arrive(refs.answered.at[stream])
        place = tile_lib.Place(worker, stream, consumer)
        _walk(refs, run, lambda *x: tile_lib.attend(refs, plan, place, *x))


def _walk(refs, run, visit):
  """Visits the part of each tile that is in a run."""
  begin, end, tile = run

  def step(state):
    at, number = state
    tile = load_tile(refs, number)
    stop = jnp.minimum(tile.next_start, end)
    visit(number, tile, at, stop, begin)
    return stop, number + 1

  lax.while_loop(lambda state: state[0] < end, step, (begin, tile))


def _copy(refs, plan, stream, number, tile, at, stop, begin):
  """Copies keys and values of chunks, and once the queries of their tile."""
  del number
  p = plan
  count = stop - at
  # Not before keys: these can be copied while the tile before is computed.
  ahead = jnp.minimum(count, p.slots // 2) - 1
  pages = _pages(refs, p, tile, tile.chunk + at - tile.start)

  def step(i, pages):
    chunk = tile.chunk + at - tile.start + i
    for half, pool in enumerate((refs.k, refs.v)):
      item = 2 * (at - begin + i) + half
      slot = stream * p.slots + lax.rem(item, p.slots)
      plgpu.barrier_wait(refs.empty.at[slot])
      for j, part in enumerate(pages):
        rows = p.heads * p.part_keys
        plgpu.copy_gmem_to_smem(
          # A product, to be seen to be whole tiles of memory.
          pool.at[pl.ds(part * p.part_keys, rows)],
          refs.ring.at[slot, pl.ds(j * rows, rows)],
          refs.full.at[slot],
        )
    pl.when(i == ahead)(lambda: _copy_queries(refs, p, stream, tile))
    return _pages(refs, p, tile, chunk + 1)

  lax.fori_loop(0, count, step, pages)


def _pages(refs, plan, tile, chunk):
  """Where in the pools each copy of a chunk begins, in `part_keys` rows.

  Read one chunk ahead, so that nothing waits for the page table.
  """
  p = plan
  last = jnp.maximum(tile.limit - 1, 0)
  head = lax.div(tile.unit * p.unit, jnp.int32(p.group))
  seq = jnp.minimum(tile.seq, p.num_seqs - 1)
  parts = p.page_size // p.part_keys
  found = []
  for j in range(p.copies):
    # Past the last page it is copied again, to have as many arrivals.
    key = jnp.minimum(chunk * p.chunk + j * p.part_keys, last)
    part = lax.div(key, jnp.int32(p.part_keys))
    at = jnp.minimum(lax.div(part, jnp.int32(parts)), p.pages_per_seq - 1)
    page = refs.pages[seq * p.pages_per_seq + at]
    page = jnp.clip(page, 0, p.num_pages - 1)
    page += refs.params[LAYER] * p.num_pages
    found.append((page * p.num_kv + head) * parts + lax.rem(part, parts))
  return tuple(found)


def _copy_queries(refs, plan, stream, tile):
  p = plan
  plgpu.barrier_wait(refs.answered.at[stream])
  for consumer in range(p.consumers):
    first = first_token(p, tile.begin, consumer)

    @pl.loop(0, p.queries)
    def _(i, first=first, consumer=consumer):
      row = (first + i) * p.num_heads + tile.unit * p.unit
      plgpu.copy_gmem_to_smem(
        refs.q.at[pl.ds(row, p.unit)],
        refs.staging.at[
          stream * p.consumers + consumer, pl.ds(i * p.unit, p.unit)
        ],
        refs.asked.at[stream],
      )
