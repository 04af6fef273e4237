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
# Two have as many as a thread can have from the start.
_REGISTERS = {3: (56, 224), 4: (32, 224)}


def barriers(plan: Plan) -> dict[str, plgpu.Barrier]:
  """Of a block, `streams` times so many as a stream needs."""
  p = plan
  ring = dict(num_barriers=p.streams * p.slots)
  one = dict(num_barriers=p.streams)
  copies = p.copies * (1 + p.has_scales)
  made = dict(
    full=plgpu.Barrier(num_arrivals=copies, **ring),
    empty=plgpu.Barrier(num_arrivals=p.consumers, **ring),
    asked=plgpu.Barrier(num_arrivals=p.tile_queries * p.parts, **one),
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


def kernel(refs: Any, plan: Plan) -> None:
  """Runs the worker that this warpgroup belongs to."""
  p = plan
  wg = lax.axis_index('wg')
  size = 1 + p.consumers
  stream, role = lax.div(wg, size), lax.rem(wg, size)
  worker = lax.axis_index('block') * p.streams + stream
  copying, computing = _REGISTERS.get(p.warpgroups, (0, 0))

  @pl.when(role == 0)
  def _():
    if copying:
      plgpu.set_max_registers(copying, action='decrease')
    run = load_run(refs, worker)
    _walk(refs, run, lambda *x: _copy(refs, p, stream, *x))

  @pl.when(role > 0)
  def _():
    if computing:
      plgpu.set_max_registers(computing, action='increase')
    run = load_run(refs, worker)
    place = tile_lib.Place(worker, stream, role - 1)
    tile_lib.begin(refs, p, place)
    for slot in range(p.slots):
      plgpu.barrier_arrive(refs.empty.at[stream * p.slots + slot])
    plgpu.barrier_arrive(refs.answered.at[stream])
    _walk(refs, run, lambda *x: tile_lib.attend(refs, p, place, *x))


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
  # Past the last page it is copied again, to have as many arrivals.
  last = jnp.maximum(tile.limit - 1, 0) // p.part_keys
  most = p.pages_per_seq * (p.page_size // p.part_keys) - 1
  tile.last_part = jnp.minimum(last, most)
  tile.row = jnp.minimum(tile.seq, p.num_seqs - 1) * p.pages_per_seq
  tile.head = lax.div(tile.unit * p.unit, jnp.int32(p.group))
  tile.first_page = refs.layer[0] * p.num_pages
  # Not before keys: these can be copied while the tile before is computed.
  ahead = jnp.minimum(count, p.slots // 2) - 1
  pools = (refs.k, None), (refs.v, None)
  if p.has_scales:
    pools = (refs.k, refs.k_scales), (refs.v, refs.v_scales)
  pages = _pages(refs, p, tile, tile.chunk + at - tile.start)

  def step(i, pages):
    chunk = tile.chunk + at - tile.start + i
    for half, (pool, scales) in enumerate(pools):
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
        if p.has_scales:
          plgpu.copy_gmem_to_smem(
            scales.at[pl.ds(part * p.part_keys, rows)],
            refs.scales.at[slot, pl.ds(j * rows, rows)],
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
  shift = (p.page_size // p.part_keys).bit_length() - 1
  found = []
  for j in range(p.copies):
    part = jnp.minimum(chunk * p.copies + j, tile.last_part)
    page = refs.pages[tile.row + (part >> shift)]
    page = tile.first_page + jnp.clip(page, 0, p.num_pages - 1)
    rest = part & ((1 << shift) - 1)
    found.append(((page * p.num_kv + tile.head) << shift) + rest)
  return tuple(found)


def _copy_queries(refs, plan, stream, tile):
  p = plan
  plgpu.barrier_wait(refs.answered.at[stream])
  for consumer in range(p.consumers):
    first = p.first_token(tile.begin, consumer)

    # From zero, without telling: unrolled it would take too many registers.
    @pl.loop(jnp.minimum(tile.begin, 0), p.queries)
    def _(i, first=first, consumer=consumer):
      row = (first + i) * p.num_heads + tile.unit * p.unit
      mine = stream * p.consumers + consumer
      for part in range(p.parts):
        columns = pl.ds(part * p.width, p.width)
        plgpu.copy_gmem_to_smem(
          refs.q.at[pl.ds(row, p.unit), columns],
          refs.staging.at[mine * p.parts + part, pl.ds(i * p.unit, p.unit)],
          refs.asked.at[stream],
        )
