"""The Hopper kernel of grouped_matmul's result and of its rows' gradient.

Tiles are counted from the eight rows where a group starts, since a swizzled
copy starts at a multiple of eight: only the first and the last tile of a group
may have rows of others. These store their own by copies of powers of two. What
runs at a time is a few tiles of rows by many of columns, so that a matrix is
read from HBM once for those rows.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import hopper_matmul
from pallas_kernels.common import varying

CONSUMERS = 2
_ROWS = hopper.ROWS
# Rows that a swizzled copy starts at a multiple of.
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one call.

  Attributes:
    block_rows: Rows of a tile: 128, half for each warpgroup, or 64, with half
      of the columns for each.
    block_n: Columns of a tile.
    depth: Columns of lhs of one step.
    slots: Steps in shared memory.
    across: Tiles of rows that run together, a multiple of `peers`.
    peers: Blocks of a cluster, with neighbouring tiles of rows, which share
      copies of a matrix where both tiles are of one group: 1 or 2.
    blocks: Thread blocks, at most.
    transposed: Whether matrices are `[N, K]`.
  """

  block_rows: int
  block_n: int
  depth: int
  slots: int
  across: int
  peers: int
  blocks: int
  transposed: bool


def call(
  plan: Plan,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  out_dtype: jnp.dtype,
) -> jax.Array:
  """Rows of each group times its matrix.

  Args:
    plan: Sizes.
    lhs: `[M, K]`; M is a multiple of 8, K and N of 64.
    rhs: `[E, K, N]`, or `[E, N, K]` where transposed.
    group_sizes: `[E]`.
    out_dtype: Of the result.

  Returns:
    `[M, N]`; zeros beyond the sum of the groups.
  """
  num_rows = lhs.shape[0]
  n = rhs.shape[1 if plan.transposed else 2]
  items = tiles_of_rows(group_sizes, num_rows, plan.block_rows, plan.across)
  tiles = items[0].shape[0] * pl.cdiv(n, plan.block_n)
  plan = dataclasses.replace(plan, blocks=min(plan.blocks, tiles))
  rhs_tile = (plan.depth, plan.block_n)
  if plan.transposed:
    rhs_tile = rhs_tile[::-1]
  stage = (CONSUMERS, _ROWS, hopper_matmul.chunk(out_dtype))
  full, empty = hopper_matmul.barriers(plan.slots, 2, CONSUMERS, plan.peers)
  return hopper.kernel(
    functools.partial(_product_kernel, plan=plan),
    name='grouped_matmul_d_lhs' if plan.transposed else 'grouped_matmul',
    out=varying.shape((num_rows, n), out_dtype, lhs),
    grid=dict(cluster=plan.blocks // plan.peers),
    cluster={hopper_matmul.CLUSTER: plan.peers},
    scratch=dict(
      lhs_tiles=hopper.tile(
        (plan.slots, plan.block_rows, plan.depth), lhs.dtype
      ),
      rhs_tiles=hopper.tile((plan.slots, *rhs_tile), rhs.dtype),
      stages=hopper.tile(stage, out_dtype),
      edges=plgpu.SMEM(stage, out_dtype),
      full=full,
      empty=empty,
    ),
    warpgroups=CONSUMERS + 1,
  )(*items, lhs, rhs)


def tiles_of_rows(
  group_sizes: jax.Array, num_rows: int, block_rows: int, across: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Lists tiles of rows, each of one group.

  Args:
    group_sizes: `[E]`.
    num_rows: Of all groups and of none.
    block_rows: Of a tile, at most.
    across: What the length of the list is a multiple of.

  Returns:
    Group, E for rows of none; first row, divided by 8; its own rows in the
    tile, from and up to: none for the entries left over.
  """
  sizes = group_sizes.astype(jnp.int32)
  sizes = jnp.append(sizes, jnp.maximum(num_rows - jnp.sum(sizes), 0))
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  tops = starts // ALIGNMENT * ALIGNMENT
  tiles = jnp.where(sizes > 0, -(-(ends - tops) // block_rows), 0)
  tile_ends = jnp.cumsum(tiles)
  groups = sizes.shape[0]
  bound = (num_rows + (ALIGNMENT - 1) * groups) // block_rows + groups
  bound = -(-bound // across) * across
  index = jnp.arange(bound, dtype=jnp.int32)
  group = jnp.sum(tile_ends <= index[:, None], axis=1, dtype=jnp.int32)
  group = jnp.minimum(group, groups - 1)
  within = index - (tile_ends - tiles)[group]
  top = tops[group] + within * block_rows
  low = jnp.maximum(starts[group] - top, 0)
  high = jnp.clip(ends[group] - top, 0, block_rows)
  return group, top // ALIGNMENT, low, high


def _product_kernel(
  groups,
  tops,
  lows,
  highs,
  lhs,
  rhs,
  out,
  lhs_tiles,
  rhs_tiles,
  stages,
  edges,
  full,
  empty,
  *,
  plan,
):
  """Every `plan.blocks`-th tile; see `call`."""
  ring = hopper_matmul.Ring(full, empty, plan.slots)
  num_groups = rhs.shape[0]
  columns = pl.cdiv(out.shape[1], plan.block_n)
  lines = groups.shape[0] // plan.peers
  clusters = plan.blocks // plan.peers
  cluster = jax.lax.axis_index('cluster')
  peer = jax.lax.axis_index(hopper_matmul.CLUSTER)
  halves_rows = plan.block_rows == CONSUMERS * _ROWS
  width = plan.block_n if halves_rows else plan.block_n // CONSUMERS

  def each_tile(body):
    def visit(i, done):
      line, column = hopper_matmul.blocks_of_tiles(
        cluster + i * clusters,
        plan.across // plan.peers,
        (lines, columns),
      )
      item = line * plan.peers + peer
      group, low, high = groups[item], lows[item], highs[item]
      top = pl.multiple_of(tops[item] * ALIGNMENT, ALIGNMENT)
      is_product = runs = (high > low) & (group < num_groups)
      is_shared = plan.peers > 1
      if plan.peers > 1:
        # Peers do the same steps, also where one of them has nothing to do.
        other = line * plan.peers + 1 - peer
        theirs = (highs[other] > lows[other]) & (groups[other] < num_groups)
        runs = is_product | theirs
        is_shared = is_product & theirs & (groups[other] == group)
      steps = jnp.where(runs, pl.cdiv(lhs.shape[1], plan.depth), 0)
      tile = (group, is_product, is_shared, top, low, high)
      return body(done, steps, column * plan.block_n, *tile)

    mine = pl.cdiv(lines * columns - cluster, clusters)
    return jax.lax.fori_loop(0, mine, visit, jnp.int32(0))

  def copy_tile(done, steps, left, group, is_product, is_shared, top, *_):
    del is_product
    group = jnp.minimum(group, num_groups - 1)

    def copies(step, slot, arrived):
      ks = pl.ds(step * plan.depth, plan.depth)
      ns = pl.ds(left, plan.block_n)
      plgpu.copy_gmem_to_smem(
        lhs.at[pl.ds(top, plan.block_rows), ks], lhs_tiles.at[slot], arrived
      )
      matrix = (ns, ks) if plan.transposed else (ks, ns)

      def copy_matrix(axis=None):
        plgpu.copy_gmem_to_smem(
          rhs.at[group, *matrix],
          rhs_tiles.at[slot],
          arrived,
          collective_axes=axis,
        )

      if plan.peers == 1:
        return copy_matrix()
      pl.when(is_shared)(lambda: copy_matrix(hopper_matmul.CLUSTER))
      pl.when(~is_shared)(copy_matrix)

    return hopper_matmul.fill(ring, done, steps, copies)

  def multiply_tile(wg, done, steps, left, group, is_product, *tile):
    del group
    _, top, low, high = tile
    mine = pl.ds(wg * _ROWS if halves_rows else 0, _ROWS)
    ns = pl.ds(0 if halves_rows else wg * width, width)

    def product(acc):
      def one(step, slot):
        del step
        if plan.transposed:
          matrix = rhs_tiles.at[slot, ns].T
        else:
          matrix = rhs_tiles.at[slot, :, ns]
        plgpu.wgmma(acc, lhs_tiles.at[slot, mine], matrix)

      hopper_matmul.drain(ring, done, steps, one)
      return acc[...]

    values = pl.run_scoped(product, plgpu.ACC((_ROWS, width)))
    if plan.peers > 1:
      # Rows of no group are zeros, whatever was multiplied.
      values = jnp.where(
        jnp.broadcast_to(is_product, values.shape), values, 0.0
      )
    if halves_rows:
      top, low, high = top + wg * _ROWS, low - wg * _ROWS, high - wg * _ROWS
      low = jnp.maximum(low, 0)
    else:
      left = left + wg * width
    _store(values, stages.at[wg], edges.at[wg], out, top, low, high, left)
    return done + steps

  hopper_matmul.run(ring, CONSUMERS, each_tile, copy_tile, multiply_tile)


def _store(values, stage, edge, out, top, low, high, left):
  """Stores rows `[low, high)` of a warpgroup's tile, which starts at `top`."""
  width = stage.shape[-1]
  is_whole = (low == 0) & (high >= _ROWS)

  @pl.when(is_whole)
  def _():
    def send(column, stage):
      rows = pl.ds(pl.multiple_of(top, ALIGNMENT), _ROWS)
      ns = pl.ds(pl.multiple_of(left + column, width), width)
      plgpu.copy_smem_to_gmem(stage, out.at[rows, ns])

    hopper_matmul.store(values, stage, send)

  @pl.when((low < high) & ~is_whole)
  def _():
    def send(column, stage):
      ns = pl.ds(left + column, width)
      hopper_matmul.send_rows(
        stage,
        low,
        jnp.minimum(high, _ROWS),
        _ROWS,
        lambda row, size: out.at[pl.ds(top + row, size), ns],
      )

    hopper_matmul.store(values, edge, send)
