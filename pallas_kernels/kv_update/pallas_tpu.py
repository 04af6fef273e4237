"""kv_update for TPUs: tokens of the same tile of a page are stored together.

A page keeps the tokens of a head in the sublanes of a tile, where one token
alone cannot be addressed. So the kernel works on runs: neighbours in the batch
that are neighbours in one tile. A tile that a run fills is written; any other
is read, the tokens are put in, and it is written back. Reads and writes of many
runs are in flight at once. A run whose tile an earlier one in flight changes
too waits for that one. With quantised pages the tile is the whole page, since
the scales of a page cannot be written apart.

*Cost*: HBM: reads the new tokens, writes a tile (16 tokens of bfloat16) per run
and reads one per run that does not fill its own; no FLOPs to speak of. VMEM:
two blocks of new tokens and `ring` tiles, for keys and for values.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import tuned
from pallas_kernels.kv_update.reference import largest

_LANES = 128
# Two cores work as one: each takes half of the heads.
_MEGACORE = ('v4', 'v5p')
_RING = 32
_BLOCK_TOKENS = 512
_READ, _ORDERED = 1, 2


def kv_update(
  k_pages,
  v_pages,
  layer,
  slot,
  k_new,
  v_new,
  k_scales,
  v_scales,
  *,
  config=None,
):
  """See `api.kv_update`.

  `config` may set `ring`, the runs in flight, half of them reading ahead, and
  `block_tokens`, the tokens of a grid step.
  """
  page_size = k_pages.shape[3]
  quantized = k_scales is not None
  if k_pages.dtype.itemsize == 1 and (
    k_pages.dtype == jnp.int4 or not quantized or page_size > _LANES
  ):
    raise NotImplementedError(f'{k_pages.dtype} {page_size=} {quantized=}')
  if config is None:
    described = features(
      k_pages, v_pages, layer, slot, k_new, v_new, k_scales, v_scales
    )
    chip = chip_lib.current().name
    config = tuned.lookup('kv_update', chip, described)
  ring = config.get('ring', _RING)
  rows = page_size if quantized else _tile_rows(page_size, k_pages.dtype)
  # A run may start anywhere among the sublanes of the new tokens.
  sublanes = 32 // k_new.dtype.itemsize
  window = -(-rows // sublanes) * sublanes + sublanes
  block = -(-slot.shape[0] // sublanes) * sublanes
  block = max(min(config.get('block_tokens', _BLOCK_TOKENS), block), window)
  slot = jnp.where(slot < k_pages.shape[1] * page_size, slot, -1)
  slot = slot.astype(jnp.int32)
  pools = [k_pages, v_pages, *([k_scales, v_scales] if quantized else [])]
  out = _call(
    (jnp.reshape(layer, 1), slot, _runs(slot, rows, block, ring)),
    [_by_head(x, window) for x in (k_new, v_new)],
    pools,
    block=block,
    rows=rows,
    window=window,
    ring=ring,
  )
  return tuple(out) + (None,) * (4 - len(pools))


def _call(scalars, new_KTH, pools, *, block, rows, window, ring):
  """The kernel, for heads in one or two groups and blocks of tokens."""
  num_kv, page_size, h = pools[0].shape[2:]
  num_tokens = scalars[1].shape[0]
  groups = 1
  # Scales of a page have the heads in the sublanes: they are not divided.
  if chip_lib.current().name in _MEGACORE and num_kv % 2 == 0:
    groups = 2 if len(pools) == 2 else 1
  heads = num_kv // groups
  scratch = [pltpu.VMEM((ring, heads, rows, h), x.dtype) for x in pools[:2]]
  scratch += [pltpu.VMEM((ring, heads, page_size), x.dtype) for x in pools[2:]]
  new_spec = pl.BlockSpec((heads, block, h), lambda g, i, *_: (g, i, 0))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(
      _kv_update_kernel,
      num_tokens=num_tokens,
      block=block,
      rows=rows,
      window=window,
      ring=ring,
      num_pools=len(pools),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(groups, pl.cdiv(num_tokens, block)),
      in_specs=[new_spec, new_spec, *[anywhere] * len(pools)],
      out_specs=[anywhere] * len(pools),
      scratch_shapes=[
        *scratch,
        pltpu.SMEM((2, ring), jnp.int32),
        pltpu.SemaphoreType.DMA((2, ring)),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools],
    input_output_aliases={len(scalars) + 2 + i: i for i in range(len(pools))},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      has_side_effects=True,
      # Slots past the pool are dropped before.
      disable_bounds_checks=True,
    ),
    name='kv_update',
  )(*scalars, *new_KTH, *pools)


def features(k_pages, v_pages, layer, slot, k_new, v_new, k_scales, v_scales):
  """What describes an input to the tuner."""
  del v_pages, layer, k_new, v_new, v_scales
  return dict(
    tokens=slot.shape[0],
    kv_heads=k_pages.shape[2],
    head_dim=k_pages.shape[4],
    page_size=k_pages.shape[3],
    dtype=k_pages.dtype.name,
    quantized=k_scales is not None,
  )


def candidates(chip, *args):
  """Configurations to try."""
  del chip, args
  return [
    dict(ring=ring, block_tokens=block_tokens)
    for ring in (16, 32, 64)
    for block_tokens in (256, 512, 1024)
  ]


def _tile_rows(page_size, dtype):
  """Tokens of a page that are stored together: a tile's sublanes."""
  sublanes = 32 // dtype.itemsize
  return page_size if page_size % sublanes else sublanes


def _by_head(new_TKH, window):
  """Heads before tokens, as in pages, and at least a window of tokens."""
  new_KTH = new_TKH.swapaxes(0, 1)
  missing = max(0, window - new_KTH.shape[1])
  return (
    jnp.pad(new_KTH, ((0, 0), (0, missing), (0, 0))) if missing else new_KTH
  )


def _runs(slot, rows, block, ring):
  """Where the run that starts at each token ends, times two, plus a flag.

  The flag: an earlier run, which may still be in flight, has the same tile.
  """
  t = jnp.arange(slot.shape[0], dtype=jnp.int32)
  tile = jnp.where(slot < 0, -1, slot // rows)
  neighbours = (slot < 0) | (slot == jnp.roll(slot, 1) + 1)
  starts = (tile != jnp.roll(tile, 1)) | ~neighbours | (t % block == 0)
  starts |= (slot < 0) & (t % rows == 0)
  later = jnp.append(jnp.where(starts, t, t.size)[1:], t.size)
  ends = jax.lax.cummin(later.astype(jnp.int32), reverse=True)
  # Runs in flight start at most this many tokens apart. Each span of tokens is
  # compared with itself and the one before.
  span = min(ring * rows, t.size)
  spans = jnp.pad(tile, (0, -t.size % span), constant_values=-1)
  spans = spans.reshape(-1, span)
  before = jnp.pad(spans, ((1, 0), (0, 0)), constant_values=-1)[:-1]
  earlier = jnp.arange(span) < jnp.arange(span)[:, None]
  same = (spans[:, :, None] == spans[:, None]) & earlier
  same |= spans[:, :, None] == before[:, None]
  ordered = same.any(axis=-1).reshape(-1)[: t.size] & (tile >= 0)
  return 2 * ends + ordered.astype(jnp.int32)


def _kv_update_kernel(
  layer_ref,
  slot_ref,
  runs_ref,
  k_new_ref,
  v_new_ref,
  *refs,
  num_tokens,
  block,
  rows,
  window,
  ring,
  num_pools,
):
  """Of one group of heads and one block of tokens.

  `refs` are the pools twice (as inputs and as outputs: the same memory), a ring
  of tiles for each, the state of the ring and its semaphores.
  """
  pools, tiles = refs[num_pools : 2 * num_pools], refs[2 * num_pools : -2]
  state_ref, sems = refs[-2:]
  page_size = pools[0].shape[3]
  group, step = pl.program_id(0), pl.program_id(1)
  first = step * block
  last = jnp.minimum(first + block, num_tokens)
  lookahead = ring // 2

  def copies(b, slot, write):
    page, offset = _divide(slot, page_size)
    row = _divide(offset, rows)[0] * rows
    for pool, tile in zip(pools, tiles, strict=True):
      at = pool.at[layer_ref[0], page]
      if len(pool.shape) == 5:
        heads = pl.ds(group * tile.shape[1], tile.shape[1])
        at = at.at[heads, pl.ds(pl.multiple_of(row, rows), rows)]
      ends = (tile.at[b], at) if write else (at, tile.at[b])
      yield pltpu.make_async_copy(*ends, sems.at[int(write), b])

  def finish_write(b):
    @pl.when(state_ref[0, b] == 1)
    def _():
      for copy in copies(b, 0, write=True):
        copy.wait()
      state_ref[0, b] = 0

  def finish_all():
    jax.lax.fori_loop(0, ring, lambda b, _: finish_write(b), None)

  def prepare(t, j):
    """Starts what the run at token t needs read, if nothing is in its way."""
    b = _divide(j, ring)[1]
    finish_write(b)
    end, ordered = runs_ref[t] >> 1, runs_ref[t] & 1
    todo = jnp.where(end - t < rows, _READ, 0)
    todo = jnp.where(ordered == 1, _ORDERED, todo)
    todo = jnp.where(slot_ref[t] < 0, 0, todo)
    state_ref[1, b] = todo

    @pl.when(todo == _READ)
    def _():
      for copy in copies(b, slot_ref[t], write=False):
        copy.start()

    return end, j + 1

  def store(t, j):
    """Puts the tokens of the run at token t in their tile."""
    b = _divide(j, ring)[1]
    slot, end, todo = slot_ref[t], runs_ref[t] >> 1, state_ref[1, b]
    partial = end - t < rows

    @pl.when(todo == _ORDERED)
    def _():
      finish_all()

      @pl.when(partial)
      def _():
        for copy in copies(b, slot, write=False):
          copy.start()

    @pl.when((todo != 0) & partial)
    def _():
      for copy in copies(b, slot, write=False):
        copy.wait()

    @pl.when(slot >= 0)
    def _():
      offset = _divide(slot, rows)[1]
      for i, new_ref in enumerate((k_new_ref, v_new_ref)):
        put = _put if num_pools == 2 else _put_quantized
        put(
          new_ref,
          *(x.at[b] for x in tiles[i::2]),
          t - first,
          offset,
          end - t,
          window=window,
        )
      for copy in copies(b, slot, write=True):
        copy.start()
      state_ref[0, b] = 1

    return end, j + 1

  @pl.when(step == 0)
  def _():
    jax.lax.fori_loop(0, ring, lambda b, _: _clear(state_ref, b), None)

  def behind(ahead, done):
    return (ahead[0] < last) & (ahead[1] < done[1] + lookahead)

  def body(carry):
    ahead, done = carry
    ahead = jax.lax.cond(
      behind(ahead, done), lambda: prepare(*ahead), lambda: ahead
    )
    return ahead, store(*done)

  start = first, jnp.int32(0)
  ahead = jax.lax.while_loop(
    lambda x: behind(x, start), lambda x: prepare(*x), start
  )
  jax.lax.while_loop(lambda x: x[1][0] < last, body, (ahead, start))

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    finish_all()


def _divide(x, by):
  """Quotient and remainder of a non-negative x; cheap for powers of two."""
  if by & (by - 1):
    return jax.lax.div(x, by), jax.lax.rem(x, by)
  return x >> (by.bit_length() - 1), x & (by - 1)


def _clear(state_ref, b):
  state_ref[0, b] = 0


def _window_of(new_ref, t, offset, window):
  """Where to read `window` tokens, and how far to move them down.

  Token `t` of the block then comes to row `offset`.
  """
  sublanes = 32 // new_ref.dtype.itemsize
  start = _divide(t, sublanes)[0] * sublanes
  start = jnp.minimum(start, new_ref.shape[1] - window)
  shift = offset - (t - start)
  shift = jnp.where(shift < 0, shift + window, shift)
  return pl.ds(pl.multiple_of(start, sublanes), window), shift


def _in_run(shape, axis, offset, count):
  i = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  return (i >= offset) & (i < offset + count)


def _put(new_ref, tile_ref, t, offset, count, *, window):
  """`tile[:, offset : offset + count] = new[:, t : t + count]`."""
  rows = tile_ref.shape[1]
  at, shift = _window_of(new_ref, t, offset, window)
  copied = (shift == 0) & (count == rows)

  @pl.when(copied)
  def _():
    tile_ref[...] = new_ref[:, pl.ds(at.start, rows)].astype(tile_ref.dtype)

  @pl.when(~copied)
  def _():
    # Only 32-bit numbers are moved between sublanes.
    x = pltpu.roll(new_ref[:, at].astype(jnp.float32), shift, 1)[:, :rows]
    old = tile_ref[...].astype(jnp.float32)
    x = jnp.where(_in_run(x.shape, 1, offset, count), x, old)
    tile_ref[...] = x.astype(tile_ref.dtype)


def _put_quantized(new_ref, tile_ref, scale_ref, t, offset, count, *, window):
  """The same for numbers and their scales, head by head."""
  heads, rows, _ = tile_ref.shape
  at, shift = _window_of(new_ref, t, offset, window)
  whole = jnp.issubdtype(tile_ref.dtype, jnp.integer)
  for head in range(heads):
    x = new_ref[head, at].astype(jnp.float32)
    scale = jnp.abs(x).max(axis=1, keepdims=True)
    scale *= jnp.float32(1 / largest(tile_ref.dtype))
    x = x / jnp.where(scale > 0, scale, 1)
    x = pltpu.roll(jnp.round(x) if whole else x, shift, 0)[:rows]
    old = tile_ref[head].astype(jnp.float32)
    x = jnp.where(_in_run(x.shape, 0, offset, count), x, old)
    tile_ref[head] = x.astype(tile_ref.dtype)
    # From one scale a sublane to one a lane.
    scale = pltpu.roll(jnp.broadcast_to(scale, (window, _LANES)), shift, 0)
    scale = scale[:rows]
    i, j = (
      jax.lax.broadcasted_iota(jnp.int32, scale.shape, axis) for axis in (0, 1)
    )
    scale = jnp.where(i == j, scale, 0).sum(axis=0, keepdims=True)[:, :rows]
    old = scale_ref[pl.ds(head, 1)]
    new = jnp.where(_in_run(scale.shape, 1, offset, count), scale, old)
    scale_ref[pl.ds(head, 1)] = new
