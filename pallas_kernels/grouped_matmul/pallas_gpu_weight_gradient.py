"""The Hopper kernel of grouped_matmul's gradient with respect to its matrices.

A tile of a matrix's gradient is a sum over the rows of its group, `depth` at a
time: both operands lie in shared memory with their rows outermost, and WGMMA
takes either as its transpose. Steps are counted from the eight rows where the
group starts, so its first and its last one may have rows of others; there the
warpgroups write zeros over them, on both sides, since they may hold anything.
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
from pallas_kernels.grouped_matmul import pallas_gpu_product

_CONSUMERS = pallas_gpu_product.CONSUMERS
_ROWS = hopper.ROWS
_ALIGNMENT = pallas_gpu_product.ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one call.

  Attributes:
    block_n: Columns of a tile; it has 64 rows for each warpgroup.
    depth: Rows of the group of one step.
    slots: Steps in shared memory.
    across: Tiles of K that run together, a multiple of `peers`.
    peers: Blocks of a cluster, with neighbouring tiles of K, which share copies
      of the cotangent: 1 or 2.
    blocks: Thread blocks, at most.
  """

  block_n: int
  depth: int
  slots: int
  across: int
  peers: int
  blocks: int


def call(
  plan: Plan,
  lhs: jax.Array,
  d_out: jax.Array,
  group_sizes: jax.Array,
  out_dtype: jnp.dtype,
) -> jax.Array:
  """Sums of outer products of the rows of each group.

  Args:
    plan: Sizes.
    lhs: `[M, K]`; M is a multiple of 8, K of 64.
    d_out: `[M, N]`; N is a multiple of 64.
    group_sizes: `[E]`.
    out_dtype: Of the result.

  Returns:
    `[E, K, N]`; zeros for groups without rows.
  """
  sizes = group_sizes.astype(jnp.int32)
  ends = jnp.cumsum(sizes)
  shape = (group_sizes.shape[0], lhs.shape[1], d_out.shape[1])
  rows = pl.cdiv(shape[1], _CONSUMERS * _ROWS)
  rows = pl.cdiv(rows, plan.peers) * plan.peers
  tiles = shape[0] * rows * pl.cdiv(shape[2], plan.block_n)
  plan = dataclasses.replace(
    plan, blocks=min(plan.blocks, tiles), across=min(plan.across, rows)
  )
  stage = (_CONSUMERS, _ROWS, hopper_matmul.chunk(out_dtype))
  full, empty = hopper_matmul.barriers(plan.slots, 2, _CONSUMERS, plan.peers)
  tile = (plan.slots, plan.depth)
  return hopper.kernel(
    functools.partial(_weight_gradient_kernel, plan=plan),
    name='grouped_matmul_d_rhs',
    out=varying.shape(shape, out_dtype, lhs),
    grid=dict(cluster=plan.blocks // plan.peers),
    cluster={hopper_matmul.CLUSTER: plan.peers},
    scratch=dict(
      lhs_tiles=hopper.tile((*tile, _CONSUMERS * _ROWS), lhs.dtype),
      d_out_tiles=hopper.tile((*tile, plan.block_n), d_out.dtype),
      stages=hopper.tile(stage, out_dtype),
      full=full,
      empty=empty,
      masked=plgpu.Barrier(num_arrivals=_CONSUMERS),
    ),
    warpgroups=_CONSUMERS + 1,
  )(ends - sizes, ends, lhs, d_out)


def _weight_gradient_kernel(
  starts,
  ends,
  lhs,
  d_out,
  out,
  lhs_tiles,
  d_out_tiles,
  stages,
  full,
  empty,
  masked,
  *,
  plan,
):
  """Every `plan.blocks`-th tile; see `call`."""
  ring = hopper_matmul.Ring(full, empty, plan.slots)
  num_groups, k, n = out.shape
  block_k = _CONSUMERS * _ROWS
  rows = pl.cdiv(pl.cdiv(k, block_k), plan.across) * plan.across
  columns = pl.cdiv(n, plan.block_n)
  per_group = rows // plan.peers * columns
  clusters = plan.blocks // plan.peers
  cluster = jax.lax.axis_index('cluster')
  peer = jax.lax.axis_index(hopper_matmul.CLUSTER)

  def each_tile(body):
    def visit(i, done):
      tile = cluster + i * clusters
      group = jax.lax.div(tile, per_group)
      row, column = hopper_matmul.blocks_of_tiles(
        jax.lax.rem(tile, per_group),
        plan.across // plan.peers,
        (rows // plan.peers, columns),
      )
      row = row * plan.peers
      start = starts[group]
      eighth = jax.lax.div(start, _ALIGNMENT)
      low, high = (a - eighth * _ALIGNMENT for a in (start, ends[group]))
      has_rows = (high > low) & (row * block_k < k)
      steps = jnp.where(has_rows, pl.cdiv(high, plan.depth), 0)
      row = row + peer
      return body(done, steps, group, eighth, low, high, row, column)

    mine = pl.cdiv(num_groups * per_group - cluster, clusters)
    return jax.lax.fori_loop(0, mine, visit, jnp.int32(0))

  def copy_tile(done, steps, group, eighth, low, high, row, column):
    del group, low, high

    def copies(step, slot, arrived):
      top = pl.multiple_of(eighth * _ALIGNMENT, _ALIGNMENT) + step * plan.depth
      rows = pl.ds(pl.multiple_of(top, _ALIGNMENT), plan.depth)
      plgpu.copy_gmem_to_smem(
        lhs.at[rows, pl.ds(row * block_k, block_k)], lhs_tiles.at[slot], arrived
      )
      plgpu.copy_gmem_to_smem(
        d_out.at[rows, pl.ds(column * plan.block_n, plan.block_n)],
        d_out_tiles.at[slot],
        arrived,
        collective_axes=hopper_matmul.CLUSTER if plan.peers > 1 else None,
      )

    return hopper_matmul.fill(ring, done, steps, copies)

  def multiply_tile(wg, done, steps, group, eighth, low, high, row, column):
    del eighth
    ks = pl.ds(wg * _ROWS, _ROWS)
    share = plan.block_n // _CONSUMERS

    def product(acc):
      def one(step, slot):
        first, end = low - step * plan.depth, high - step * plan.depth

        @pl.when((first > 0) | (end < plan.depth))
        def _():
          _keep(lhs_tiles.at[slot, :, ks], first, end)
          for left in range(0, share, _ROWS):
            ns = pl.ds(wg * share + left, _ROWS)
            _keep(d_out_tiles.at[slot, :, ns], first, end)
          plgpu.commit_smem()
          # The other warpgroup multiplies by what this one has masked.
          plgpu.barrier_arrive(masked)
          plgpu.barrier_wait(masked)

        plgpu.wgmma(acc, lhs_tiles.at[slot, :, ks].T, d_out_tiles.at[slot])

      hopper_matmul.drain(ring, done, steps, one)
      return acc[...]

    values = pl.run_scoped(product, plgpu.ACC((_ROWS, plan.block_n)))

    def send(left, stage):
      width = stage.shape[-1]
      plgpu.copy_smem_to_gmem(
        stage,
        out.at[
          group,
          pl.ds(row * block_k + wg * _ROWS, _ROWS),
          pl.ds(pl.multiple_of(column * plan.block_n + left, width), width),
        ],
      )

    @pl.when(row * block_k < k)
    def _():
      hopper_matmul.store(values, stages.at[wg], send)

    return done + steps

  hopper_matmul.run(ring, _CONSUMERS, each_tile, copy_tile, multiply_tile)


def _keep(tile, first, end):
  """Writes zeros over the rows of a tile outside of `[first, end)`."""
  row = plgpu.layout_cast(
    jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0), plgpu.Layout.WGMMA
  )
  values = tile[...].astype(jnp.float32)
  values = jnp.where((row >= first) & (row < end), values, 0.0)
  tile[...] = values.astype(tile.dtype)
