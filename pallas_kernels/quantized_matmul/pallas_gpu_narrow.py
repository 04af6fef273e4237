"""quantized_matmul on Hopper with both sides in eight bits, for many rows.

WGMMA reads eight-bit operands with K innermost only, so the matrix comes
transposed. Sums of int8 are exact. Those of float8 are not: the tensor cores
keep about 14 bits of a sum, so each step's sum, 128 products, is added to one
in float32 registers (DeepSeek-AI, "DeepSeek-V3 Technical Report",
https://arxiv.org/abs/2412.19437, section 3.3.2; known to us, and not read for
this). A warpgroup then has twice 64 rows, one at a time, so that both
warpgroups' additions overlap with products.
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
# Of K, in a step: one swizzle of bytes.
DEPTH = hopper_matmul.SWIZZLE
# Rows and columns of a tile.
BLOCKS = {'int8': (128, 256), 'float8_e4m3fn': (256, 128)}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one call.

  Attributes:
    slots: Steps in shared memory.
    across: Tiles of rows that run together, a multiple of `peers`.
    peers: Blocks of a cluster, one below the other, which share copies of
      weights: 1 or 2.
    blocks: Thread blocks, at most.
  """

  slots: int
  across: int
  peers: int
  blocks: int


def slot_bytes(dtype: jnp.dtype) -> int:
  """Shared memory of a step."""
  return DEPTH * sum(BLOCKS[jnp.dtype(dtype).name])


def call(
  plan: Plan,
  x: jax.Array,
  x_scales: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  out_dtype: jnp.dtype,
) -> jax.Array:
  """Multiplies, and scales rows and columns.

  Args:
    plan: Sizes.
    x: `[M, K]`; M is a multiple of 8, K of 128.
    x_scales: float32 `[M']`, M rounded up to a multiple of the tile's rows.
    weights: `[N, K]` of the same dtype; N is a multiple of 64.
    scales: float32 `[N']`, N rounded up to a multiple of the tile's columns.
    out_dtype: Of the result.

  Returns:
    `[M, N]`.
  """
  shape = (x.shape[0], weights.shape[0])
  block_m, block_n = BLOCKS[x.dtype.name]
  rows = pl.cdiv(pl.cdiv(shape[0], block_m), plan.peers) * plan.peers
  plan = dataclasses.replace(
    plan,
    blocks=min(plan.blocks, rows * pl.cdiv(shape[1], block_n)),
    across=min(plan.across, rows),
  )
  full, empty = hopper_matmul.barriers(plan.slots, 2, CONSUMERS, plan.peers)
  return hopper.kernel(
    functools.partial(_narrow_kernel, plan=plan),
    name='quantized_matmul_narrow',
    out=varying.shape(shape, out_dtype, x),
    grid=dict(cluster=plan.blocks // plan.peers),
    cluster={hopper_matmul.CLUSTER: plan.peers},
    scratch=dict(
      x_tiles=hopper.tile((plan.slots, block_m, DEPTH), x.dtype),
      weight_tiles=hopper.tile((plan.slots, block_n, DEPTH), x.dtype),
      stages=hopper.tile(
        (CONSUMERS, _ROWS, hopper_matmul.chunk(out_dtype)), out_dtype
      ),
      full=full,
      empty=empty,
    ),
    warpgroups=CONSUMERS + 1,
  )(x, x_scales, weights, scales)


def _narrow_kernel(
  x,
  x_scales,
  weights,
  scales,
  out,
  x_tiles,
  weight_tiles,
  stages,
  full,
  empty,
  *,
  plan,
):
  """Every `plan.blocks`-th tile; see `call`."""
  ring = hopper_matmul.Ring(full, empty, plan.slots)
  block_m, block_n = BLOCKS[x.dtype.name]
  rows, columns = (
    pl.cdiv(size, block)
    for size, block in zip(out.shape, (block_m, block_n), strict=True)
  )
  lines = pl.cdiv(rows, plan.across) * plan.across
  all_steps = x.shape[1] // DEPTH
  clusters = plan.blocks // plan.peers
  cluster = jax.lax.axis_index('cluster')
  peer = jax.lax.axis_index(hopper_matmul.CLUSTER)

  def each_tile(body):
    def visit(i, done):
      # Peers do the same steps, also where the second one has no rows.
      row, column = hopper_matmul.blocks_of_tiles(
        cluster + i * clusters,
        plan.across // plan.peers,
        (lines // plan.peers, columns),
      )
      row = row * plan.peers
      steps = jnp.where(row < rows, all_steps, 0)
      return body(done, steps, row + peer, column)

    mine = pl.cdiv(lines // plan.peers * columns - cluster, clusters)
    return jax.lax.fori_loop(0, mine, visit, jnp.int32(0))

  def copy_tile(done, steps, row, column):
    def copies(step, slot, arrived):
      ks = pl.ds(step * DEPTH, DEPTH)
      plgpu.copy_gmem_to_smem(
        x.at[pl.ds(row * block_m, block_m), ks], x_tiles.at[slot], arrived
      )
      plgpu.copy_gmem_to_smem(
        weights.at[pl.ds(column * block_n, block_n), ks],
        weight_tiles.at[slot],
        arrived,
        collective_axes=hopper_matmul.CLUSTER if plan.peers > 1 else None,
      )

    return hopper_matmul.fill(ring, done, steps, copies)

  def multiply_tile(wg, done, steps, row, column):
    multiply = _exact if x.dtype == jnp.int8 else _promoted
    parts = multiply(ring, x_tiles, weight_tiles, wg, done, steps)

    @pl.when(row < rows)
    def _():
      left = column * block_n
      top = row * block_m + wg * (block_m // CONSUMERS)
      all_columns = pl.ds(pl.multiple_of(left, block_n), block_n)
      scale = hopper.load(scales, (all_columns,), plgpu.Layout.WGMMA.reduce(0))
      for i, values in enumerate(parts):
        first = pl.multiple_of(top + i * _ROWS, _ROWS)
        row_scale = hopper.load(
          x_scales, (pl.ds(first, _ROWS),), plgpu.Layout.WGMMA.reduce(1)
        )
        values = values.astype(jnp.float32)
        values *= jax.lax.broadcast_in_dim(row_scale, values.shape, (0,))
        values *= jax.lax.broadcast_in_dim(scale, values.shape, (1,))

        def send(column, stage, first=first):
          width = stage.shape[-1]
          ns = pl.ds(pl.multiple_of(left + column, width), width)
          plgpu.copy_smem_to_gmem(stage, out.at[pl.ds(first, _ROWS), ns])

        hopper_matmul.store(values, stages.at[wg], send)

    return done + steps

  hopper_matmul.run(ring, CONSUMERS, each_tile, copy_tile, multiply_tile)


def _exact(ring, x_tiles, weight_tiles, wg, done, steps):
  """A warpgroup's sums of int8, a tile of 64 rows."""
  mine = pl.ds(pl.multiple_of(wg * _ROWS, _ROWS), _ROWS)

  def product(acc):
    def one(step, slot):
      del step
      plgpu.wgmma(acc, x_tiles.at[slot, mine], weight_tiles.at[slot].T)

    hopper_matmul.drain(ring, done, steps, one)
    return acc[...]

  shape = (_ROWS, weight_tiles.shape[1])
  return [pl.run_scoped(product, plgpu.ACC(shape, jnp.int32))]


def _promoted(ring, x_tiles, weight_tiles, wg, done, steps):
  """A warpgroup's sums of float8, two tiles of 64 rows."""
  parts = x_tiles.shape[1] // CONSUMERS // _ROWS
  shape = (_ROWS, weight_tiles.shape[1])

  def one(step, totals):
    slot = jax.lax.rem(done + step, ring.slots)
    plgpu.barrier_wait(ring.full.at[slot])

    def product(part, acc):
      first = pl.multiple_of((wg * parts + part) * _ROWS, _ROWS)
      x_tile = x_tiles.at[slot, pl.ds(first, _ROWS)]
      plgpu.wgmma(acc, x_tile, weight_tiles.at[slot].T)
      return acc[...]

    totals = list(totals)
    for part in range(parts):
      totals[part] += pl.run_scoped(
        functools.partial(product, part), plgpu.ACC(shape)
      )
    plgpu.barrier_arrive(ring.empty.at[slot])
    return tuple(totals)

  zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
  return jax.lax.fori_loop(0, steps, one, (zero,) * parts)
