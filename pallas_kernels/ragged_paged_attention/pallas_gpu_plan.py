"""Sizes of ragged paged attention's kernel on a GPU, and its list of work."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper
from pallas_kernels.common.hopper import ROWS

# Numbers of a tile in the list of work, and what they are.
FIELDS = (
  *('begin', 'end', 'offset', 'chunk', 'seq', 'unit', 'limit', 'window'),
  'start',
)
# Larger ones are no different, and do not overflow when multiplied by `ROWS`.
NO_WINDOW = 2**24
# Barriers, and what lies between arrays.
_BARRIER_BYTES = 4096
# Products of wide heads are in parts: they take registers, and what they are
# added to as well.
_WIDTH = 128
# A part of fewer chunks costs more to merge than it saves.
_LEAST_CHUNKS = 4
# Scales of 128 bytes: where a copy to shared memory may begin.
_SCALES = 32
# What a prefix sum as one comparison of all pairs is good for.
_PAIRS = 2048


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is fixed when the kernel is traced.

  Attributes:
    num_tokens: T.
    num_seqs: S.
    num_heads: N.
    num_kv: K.
    group: Query heads per kv head.
    head_dim: H.
    page_size: Z.
    num_pages: P.
    pages_per_seq: M.
    heads: kv heads of a tile.
    unit: Query heads of a tile; consecutive rows of a token's queries.
    queries: Of a warpgroup.
    consumers: Warpgroups that share keys.
    streams: Rings of a block, each with a copying and `consumers` computing
      warpgroups.
    columns: Rows of a ring's slot: keys of all heads of a tile.
    slots: Of a ring; half hold keys, half values.
    blocks: Of the grid.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    has_window: Whether there is a window.
    has_scales: Whether pages are quantised.
    return_lse: Whether the log-sum-exp is a result.
  """

  num_tokens: int
  num_seqs: int
  num_heads: int
  num_kv: int
  group: int
  head_dim: int
  page_size: int
  num_pages: int
  pages_per_seq: int
  heads: int
  unit: int
  queries: int
  consumers: int
  streams: int
  columns: int
  slots: int
  blocks: int
  scale: float = 1.0
  soft_cap: float | None = None
  has_window: bool = False
  has_scales: bool = False
  return_lse: bool = False

  @property
  def width(self) -> int:
    """Columns of results that are computed, and copied, together."""
    return min(self.head_dim, _WIDTH)

  @property
  def parts(self) -> int:
    """Of the columns of a result."""
    return self.head_dim // self.width

  @property
  def units(self) -> int:
    """Tiles side by side of the same tokens."""
    return self.num_heads // self.unit

  @property
  def tile_queries(self) -> int:
    """Tokens of a tile."""
    return self.queries * self.consumers

  @property
  def chunk(self) -> int:
    """Keys of a chunk: those of one slot, of one head."""
    return self.columns // self.heads

  @property
  def part_keys(self) -> int:
    """Keys of one copy, of one head."""
    return min(self.page_size, self.chunk)

  @property
  def copies(self) -> int:
    """Copies per slot."""
    return self.chunk // self.part_keys

  @property
  def workers(self) -> int:
    """Streams of all blocks."""
    return self.blocks * self.streams

  @property
  def warpgroups(self) -> int:
    """Of a block."""
    return self.streams * (1 + self.consumers)

  @property
  def num_tiles(self) -> int:
    """No more tiles than these exist, units apart."""
    ragged = self.num_tokens // self.tile_queries + self.num_seqs + 1
    return min(self.num_tokens, ragged)

  def first_token(
    self, begin: jax.Array, consumer: jax.Array | int
  ) -> jax.Array:
    """Of a warpgroup's rows, all of which have to exist.

    Args:
      begin: First token of the tile.
      consumer: Of the worker.
    """
    first = begin + consumer * self.queries
    return jnp.minimum(first, self.num_tokens - self.queries)


def _power_of_two_divisor(x, most):
  """The largest power of two that divides `x` and is at most `most`."""
  return min(x & -x, 1 << max(most, 1).bit_length() - 1)


def plan_for(
  gpu: hopper.Gpu,
  config: Mapping[str, Any],
  q: Any,
  k_pages: Any,
  page_table: Any,
  **static: Any,
) -> Plan:
  """The plan whose sizes fit the input and the GPU.

  Args:
    gpu: What the kernel is for.
    config: Overrides what is chosen otherwise.
    q: Queries; an array or its `jax.ShapeDtypeStruct`, as the others.
    k_pages: Keys.
    page_table: Pages of each sequence.
    **static: More attributes of the plan.

  Raises:
    NotImplementedError: No ring fits the shared memory.
  """
  num_tokens, num_heads, head_dim = q.shape
  num_pages, num_kv, page_size = k_pages.shape[1:4]
  num_seqs, pages_per_seq = page_table.shape
  group = num_heads // num_kv
  sizes = _sizes(config, q.shape, k_pages.shape, num_seqs)
  plan = Plan(
    num_tokens=max(num_tokens, sizes['queries']),
    num_seqs=num_seqs,
    num_heads=num_heads,
    num_kv=num_kv,
    group=group,
    head_dim=head_dim,
    page_size=page_size,
    num_pages=num_pages,
    pages_per_seq=pages_per_seq,
    slots=0,
    blocks=config.get('blocks', gpu.num_sms),
    **sizes,
    **static,
  )
  rows = plan.heads * plan.part_keys
  if plan.has_scales and rows % _SCALES:
    raise NotImplementedError(
      f'scales of {rows} keys side by side, not a multiple of {_SCALES}: pages '
      f'of {page_size}, {num_tokens} queries of {num_seqs} sequences'
    )
  left = gpu.smem_bytes - _BARRIER_BYTES
  left -= smem_bytes(plan, q.dtype, k_pages.dtype)
  slot_bytes = head_dim * k_pages.dtype.itemsize + 4 * plan.has_scales
  slot_bytes *= plan.streams * plan.columns
  slots = min(left // slot_bytes, 16, config.get('slots', 16))
  if slots < 2:
    raise NotImplementedError(f'{plan} does not fit the memory of {gpu}')
  return dataclasses.replace(plan, slots=slots)


def _sizes(config, q_shape, pool_shape, num_seqs):
  """Attributes of a plan: of a tile, and who computes it."""
  num_tokens, num_heads, head_dim = q_shape
  num_kv, page_size = pool_shape[2:4]
  group = num_heads // num_kv
  unit = group if group <= ROWS else math.gcd(group, ROWS)
  columns = config.get('columns')
  # Of so few queries the rows of one warpgroup are enough.
  if num_tokens > num_seqs * (ROWS // unit):
    columns = columns or (128 if head_dim <= 128 else 64)
    sizes = dict(heads=1, queries=ROWS // unit, streams=1, consumers=2)
    return sizes | dict(unit=unit, columns=columns)
  columns = columns or 64
  # Pages of all heads lie side by side: the more a copy takes, the better.
  most = min(ROWS // unit, columns // min(page_size, columns))
  heads = _power_of_two_divisor(num_kv, most) if group <= ROWS else 1
  unit *= heads
  # Rows of a tile with a query each, if all sequences have as many.
  queries = min(ROWS // unit, -(-num_tokens // num_seqs))
  # Of a wide head two rings would have no room.
  streams = 1 if head_dim > _WIDTH else 2
  sizes = dict(heads=heads, queries=queries, streams=streams, consumers=1)
  return sizes | dict(unit=unit, columns=columns)


def scratch(
  plan: Plan, q_dtype: DTypeLike, page_dtype: DTypeLike
) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
  """Name to shape and dtype of what a block keeps in shared memory."""
  p = plan
  wgs = p.streams * p.consumers
  # What keys are multiplied as: float8 becomes float16 at once, exactly.
  is_float = jnp.issubdtype(page_dtype, jnp.floating)
  factor = jnp.float16 if p.has_scales and is_float else q_dtype
  shapes = dict(
    ring=((p.streams * p.slots, p.columns, p.head_dim), page_dtype),
    queries=((wgs, ROWS, p.head_dim), factor),
    staging=((wgs * p.parts, ROWS, p.width), q_dtype),
    row_lse=((wgs, ROWS), jnp.float32),
    places=((wgs, p.columns), jnp.int32),
  )
  if p.has_scales:
    shapes['wide'] = (wgs, p.columns, p.head_dim), factor
    shapes['scales'] = (p.streams * p.slots, p.columns), jnp.float32
  return shapes


def smem_bytes(plan: Plan, q_dtype: DTypeLike, page_dtype: DTypeLike) -> int:
  """Of the scratch."""
  return sum(
    math.prod(shape) * jnp.dtype(dtype).itemsize
    for shape, dtype in scratch(plan, q_dtype, page_dtype).values()
  )


def work(
  plan: Plan,
  query_start: jax.Array,
  kv_len: jax.Array,
  window: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Cuts the step into tiles of chunks, and these into equal parts.

  The chunks of all tiles are one row, of which each worker takes a run, as in
  Osama et al., "Stream-K", https://arxiv.org/abs/2301.03598: whatever the
  lengths, no worker has more than another. Tokens of no sequence are tiles
  without keys.

  Returns:
    int32 numbers `FIELDS` of each tile, one tile after the other, and once more
    `start` for the end: first and last token; what to add to a token for its
    position; first chunk; sequence; unit; cached tokens; window; how many
    chunks come before. And the tile that each worker begins with, and their
    end.
  """
  p = plan
  ends = jnp.array([p.num_tokens], jnp.int32)
  starts = jnp.concatenate([query_start.astype(jnp.int32), ends])
  lengths = jnp.concatenate([kv_len.astype(jnp.int32), jnp.zeros(1, jnp.int32)])
  of_seq = offsets(-(-jnp.diff(starts) // p.tile_queries))
  tile = jnp.arange(p.num_tiles, dtype=jnp.int32)
  seq = jnp.minimum(found(of_seq[1:], tile), p.num_seqs)
  begin = starts[seq] + (tile - of_seq[seq]) * p.tile_queries
  end = jnp.minimum(begin + p.tile_queries, starts[seq + 1])
  offset = lengths[seq] - starts[seq + 1]
  last = (end - 1 + offset) // p.chunk + 1
  first = jnp.zeros_like(last)
  limit = jnp.full_like(begin, NO_WINDOW)
  if window is not None:
    window_S = jnp.broadcast_to(window, kv_len.shape).astype(jnp.int32)
    limit = jnp.append(window_S, NO_WINDOW)[seq]
    first = jnp.maximum(begin + offset - limit + 1, 0) // p.chunk
  count = jnp.where(tile < of_seq[-1], jnp.maximum(last - first, 1), 0)
  before = offsets(count) * p.units

  unit = jnp.arange(p.units, dtype=jnp.int32)
  start = before[:-1, None] + count[:, None] * unit
  alike = (begin, end, offset, first, seq)
  columns = [jnp.broadcast_to(x[:, None], start.shape) for x in alike]
  columns += [jnp.broadcast_to(unit, start.shape)]
  columns += [
    jnp.broadcast_to(x[:, None], start.shape) for x in (lengths[seq], limit)
  ]
  columns.append(start)
  fields = jnp.stack(columns, axis=-1).reshape(-1, len(FIELDS))
  sentinel = jnp.zeros((1, len(FIELDS)), jnp.int32).at[0, -1].set(before[-1])
  fields = jnp.concatenate([fields, sentinel])

  size = jnp.maximum(-(-before[-1] // p.workers), _LEAST_CHUNKS)
  run = jnp.minimum(jnp.arange(p.workers + 1) * size, before[-1])
  run = run.astype(jnp.int32)
  tiles = jnp.minimum(found(fields[:, -1], run), p.num_tiles * p.units) - 1
  return fields.reshape(-1), jnp.stack([run, tiles], axis=-1).reshape(-1)


def found(starts: jax.Array, x: jax.Array) -> jax.Array:
  """How many of the ascending `starts` are at most each of `x`."""
  method = 'compare_all' if starts.size <= _PAIRS else 'scan'
  found = jnp.searchsorted(starts, x, side='right', method=method)
  return found.astype(jnp.int32)


def offsets(counts: jax.Array) -> jax.Array:
  """Exclusive cumulative sum, with the total at the end."""
  size = counts.shape[0]
  if size > _PAIRS:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
  # One small kernel, where a cumulative sum is several.
  is_before = jnp.arange(size) < jnp.arange(size + 1)[:, None]
  return jnp.sum(jnp.where(is_before, counts, 0), axis=1).astype(jnp.int32)
