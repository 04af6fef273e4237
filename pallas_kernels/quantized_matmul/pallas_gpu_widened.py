"""quantized_matmul on Hopper with weights that are widened in registers.

The transposed result is computed, `weights.T @ x.T`, so that the weights are
the operand that WGMMA takes from registers: they cross HBM and shared memory
as they are stored, and no widened copy exists. A warpgroup has 64 columns of
the matrix; rows of x are the other side of WGMMA, from 8 on, so that few rows
cost little. Where there are too few columns for all multiprocessors, these
share K, and XLA adds up what they find.

Eight-bit values become bfloat16 two at a time and are scaled at the end; those
of four bits become integers minus their zero point, and each group's sum is
scaled in float32.
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
from pallas_kernels.quantized_matmul import quantize

CONSUMERS = 2
# Columns of the matrix of a warpgroup, and of a block.
_COLUMNS = hopper.ROWS
BLOCK_N = CONSUMERS * _COLUMNS
# Rows of the matrix that become one operand in registers.
_PIECE = 64
# Of packed ones: words of 16 rows, so x has the smallest swizzle.
_PACKED_PIECE = quantize.PACKED_ROWS // quantize.VALUES_PER_WORD
_PACKED_SWIZZLE = 32
# Bits of a bfloat16 that are 128 and whose last one counts 1, in both halves.
_BASE_BITS, _BASE = 0x43004300, 128
_STORED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one call.

  Attributes:
    block_rows: Rows of x in a tile.
    depth: Rows of the matrix of one step, a multiple of 128.
    slots: Steps in shared memory.
    splits: Blocks that share the K of a tile.
    across: Tiles of columns that run together, a multiple of `peers`.
    peers: Blocks of a cluster, with neighbouring tiles of columns, which share
      copies of x: 1 or 2.
    blocks: Thread blocks, at most.
    group: Rows with one scale where values are packed, or 0.
    has_zeros: Whether there are zero points.
  """

  block_rows: int
  depth: int
  slots: int
  splits: int
  across: int
  peers: int
  blocks: int
  group: int
  has_zeros: bool


def slot_bytes(plan: Plan, itemsize: int) -> int:
  """Shared memory of a step; weights have `itemsize` bytes, packed ones 4."""
  rows = plan.depth // quantize.VALUES_PER_WORD if plan.group else plan.depth
  scales = plan.depth // plan.group if plan.group else 0
  return (
    2 * plan.block_rows * plan.depth
    + itemsize * rows * BLOCK_N
    + 4 * scales * BLOCK_N * (1 + plan.has_zeros)
  )


def stage_bytes(plan: Plan, itemsize: int) -> int:
  """Shared memory of what is on its way out."""
  return itemsize * min(plan.block_rows, _STORED_ROWS) * BLOCK_N


def call(
  plan: Plan,
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  zero_points: jax.Array | None,
  out_dtype: jnp.dtype,
) -> jax.Array:
  """Multiplies, and scales.

  Args:
    plan: Sizes.
    x: `[M, K]` bfloat16; M is a multiple of 8, K of 128.
    weights: `[K, N]`, or packed `[K / 8, N]`; N is a multiple of 64.
    scales: float32, `[N']` or `[K / group, N']`: N' is N rounded up to a
      multiple of `BLOCK_N`.
    zero_points: float32 as `scales`, or `None`.
    out_dtype: Of the result.

  Returns:
    `[splits, M, N]`, to be added up.
  """
  m, n = x.shape[0], weights.shape[1]
  # With less, a piece would be widened into registers that WGMMA still reads.
  assert plan.depth % (2 * _PIECE) == 0, plan
  columns = pl.cdiv(pl.cdiv(n, BLOCK_N), plan.peers) * plan.peers
  tiles = pl.cdiv(m, plan.block_rows) * columns * plan.splits
  plan = dataclasses.replace(
    plan, blocks=min(plan.blocks, tiles), across=min(plan.across, columns)
  )
  stored = min(plan.block_rows, _STORED_ROWS)
  scratch = dict(stages=hopper.tile((CONSUMERS, stored, _COLUMNS), out_dtype))
  x_tile = (plan.slots, plan.block_rows, plan.depth)
  if plan.group:
    rows = plan.depth // quantize.VALUES_PER_WORD
    swizzled = plgpu.TilingTransform((8, _PACKED_PIECE))
    scratch['x_tiles'] = plgpu.SMEM(
      x_tile,
      x.dtype,
      transforms=(swizzled, plgpu.SwizzleTransform(_PACKED_SWIZZLE)),
    )
    per_group = (plan.slots, plan.depth // plan.group, BLOCK_N)
    scratch['scale_tiles'] = plgpu.SMEM(per_group, jnp.float32)
    if plan.has_zeros:
      scratch['zero_tiles'] = plgpu.SMEM(per_group, jnp.float32)
  else:
    rows = plan.depth
    scratch['x_tiles'] = hopper.tile(x_tile, x.dtype)
  scratch['weight_tiles'] = hopper.tile(
    (plan.slots, CONSUMERS, rows, _COLUMNS), weights.dtype
  )
  scratch |= hopper_matmul.stand_ins(CONSUMERS, _PIECE, x.dtype)
  copies = 1 + CONSUMERS + bool(plan.group) + plan.has_zeros
  scratch['full'], scratch['empty'] = hopper_matmul.barriers(
    plan.slots, copies, CONSUMERS, plan.peers
  )
  operands = [x, weights, scales]
  if plan.group:
    # One instruction masks and adds if it knows only one of two constants.
    operands.append(jnp.full((1,), _BASE_BITS, jnp.int32))
  if plan.has_zeros:
    operands.append(zero_points)
  return hopper.kernel(
    functools.partial(_widened_kernel, plan=plan),
    name='quantized_matmul_widened',
    out=varying.shape((plan.splits, m, n), out_dtype, x),
    grid=dict(cluster=plan.blocks // plan.peers),
    cluster={hopper_matmul.CLUSTER: plan.peers},
    scratch=scratch,
    warpgroups=CONSUMERS + 1,
  )(*operands)


def _widened_kernel(x, weights, scales, *refs, plan, **scratch):
  """Every `plan.blocks`-th tile; `refs` are what is packed's and the result."""
  *packed, out = refs
  base = packed[0] if plan.group else None
  zeros = packed[1] if plan.has_zeros else None
  ring = hopper_matmul.Ring(scratch['full'], scratch['empty'], plan.slots)
  (m, k), n = x.shape, weights.shape[1]
  rows, columns = pl.cdiv(m, plan.block_rows), pl.cdiv(n, BLOCK_N)
  lines = pl.cdiv(columns, plan.across) * plan.across
  all_steps = k // plan.depth
  most_steps = pl.cdiv(all_steps, plan.splits)
  per_split = lines // plan.peers * rows
  clusters = plan.blocks // plan.peers
  cluster = jax.lax.axis_index('cluster')
  peer = jax.lax.axis_index(hopper_matmul.CLUSTER)

  def each_tile(body):
    def visit(i, done):
      tile = cluster + i * clusters
      split = jax.lax.div(tile, per_split)
      column, row = hopper_matmul.blocks_of_tiles(
        jax.lax.rem(tile, per_split),
        plan.across // plan.peers,
        (lines // plan.peers, rows),
      )
      column = column * plan.peers
      first = split * most_steps
      steps = jnp.clip(all_steps - first, 0, most_steps)
      # Peers do the same steps, also where the second one has no columns.
      steps = jnp.where(column < columns, steps, 0)
      return body(done, steps, first, split, row, column + peer)

    mine = pl.cdiv(per_split * plan.splits - cluster, clusters)
    return jax.lax.fori_loop(0, mine, visit, jnp.int32(0))

  def copy_tile(done, steps, first, split, row, column):
    del split

    def copies(step, slot, arrived):
      step = step + first
      depth = plan.depth
      plgpu.copy_gmem_to_smem(
        x.at[
          pl.ds(row * plan.block_rows, plan.block_rows),
          pl.ds(step * depth, depth),
        ],
        scratch['x_tiles'].at[slot],
        arrived,
        collective_axes=hopper_matmul.CLUSTER if plan.peers > 1 else None,
      )
      top = depth // quantize.VALUES_PER_WORD if plan.group else depth
      for wg in range(CONSUMERS):
        plgpu.copy_gmem_to_smem(
          weights.at[
            pl.ds(step * top, top),
            pl.ds(column * BLOCK_N + wg * _COLUMNS, _COLUMNS),
          ],
          scratch['weight_tiles'].at[slot, wg],
          arrived,
        )
      if plan.group:
        groups = depth // plan.group
        for source, name in ((scales, 'scale_tiles'), (zeros, 'zero_tiles')):
          if source is not None:
            plgpu.copy_gmem_to_smem(
              source.at[
                pl.ds(step * groups, groups), pl.ds(column * BLOCK_N, BLOCK_N)
              ],
              scratch[name].at[slot],
              arrived,
            )

    return hopper_matmul.fill(ring, done, steps, copies)

  def multiply_tile(wg, done, steps, first, split, row, column):
    del first
    if plan.group:
      values = _sum_of_groups(plan, ring, scratch, base[0], wg, done, steps)
    else:
      values = _sum_of_steps(plan, ring, scratch, wg, done, steps)
      left = jnp.minimum(column, columns - 1) * BLOCK_N
      start = pl.multiple_of(left + wg * _COLUMNS, _COLUMNS)
      scale = _of_columns(scales, pl.ds(start, _COLUMNS))
      values *= jax.lax.broadcast_in_dim(scale, values.shape, (0,))

    @pl.when(column < columns)
    def _():
      _store(values, scratch['stages'].at[wg], out.at[split], row, column, wg)

    return done + steps

  hopper_matmul.run(ring, CONSUMERS, each_tile, copy_tile, multiply_tile)


def _sum_of_steps(plan, ring, scratch, wg, done, steps):
  """The transposed product of eight-bit weights, without scales."""
  x_tiles, weight_tiles = scratch['x_tiles'], scratch['weight_tiles']

  def product(acc):
    def one(step, slot):
      del step
      for top in range(0, plan.depth, _PIECE):
        ks = pl.ds(top, _PIECE)
        narrow = plgpu.layout_cast(
          weight_tiles.at[slot, wg, ks].T[...], plgpu.Layout.WGMMA_TRANSPOSED
        )
        wide = _widen(narrow)
        hopper_matmul.multiply_registers(
          acc,
          plgpu.layout_cast(wide, plgpu.Layout.WGMMA),
          x_tiles.at[slot, :, ks].T,
          scratch.get('operands'),
        )
        # The piece before this one is no longer read from registers.
        plgpu.wgmma_wait(1)
      # As in `_release`.
      plgpu.commit_smem()

    hopper_matmul.drain(ring, done, steps, one)
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((_COLUMNS, plan.block_rows)))


def _widen(narrow):
  if narrow.dtype != jnp.int8:
    # The hardware widens float8 to float16, and that to float32.
    narrow = narrow.astype(jnp.float32)
  return narrow.astype(jnp.bfloat16)


def _sum_of_groups(plan, ring, scratch, base, wg, done, steps):
  """The transposed product of packed weights, each group scaled."""
  x_tiles, weight_tiles = scratch['x_tiles'], scratch['weight_tiles']
  shape = (_COLUMNS, plan.block_rows)
  mine = pl.ds(pl.multiple_of(wg * _COLUMNS, _COLUMNS), _COLUMNS)

  def one(step, total):
    slot = jax.lax.rem(done + step, ring.slots)
    plgpu.barrier_wait(ring.full.at[slot])
    for block in range(plan.depth // quantize.PACKED_ROWS):
      words = weight_tiles.at[
        slot, wg, pl.ds(block * _PACKED_PIECE, _PACKED_PIECE)
      ].T[...]
      words = plgpu.layout_cast(words, plgpu.Layout.WGMMA_TRANSPOSED)
      words = plgpu.layout_cast(words, plgpu.Layout.WGMMA)
      for top in range(0, quantize.PACKED_ROWS, plan.group):
        group = block * (quantize.PACKED_ROWS // plan.group) + top // plan.group
        offset = None
        if plan.has_zeros:
          offset = _of_columns(scratch['zero_tiles'], slot, group, mine)
        product = functools.partial(
          _group_product,
          plan,
          x_tiles.at[slot],
          scratch.get('operands'),
          words,
          base,
          offset,
          block,
          top,
        )
        product = pl.run_scoped(product, plgpu.ACC(shape))
        scale = _of_columns(scratch['scale_tiles'], slot, group, mine)
        total += product * jax.lax.broadcast_in_dim(scale, shape, (0,))
    _release(ring.empty.at[slot])
    return total

  zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
  return jax.lax.fori_loop(0, steps, one, zero)


def _group_product(
  plan, x_tile, operands, words, base, offset, block, top, acc
):
  """Multiplies rows `[top, top + group)` of a block of packed ones."""
  shift = _BASE + quantize.OFFSET
  if offset is None:
    shift = jnp.bfloat16(shift)
  else:
    shift = jax.lax.broadcast_in_dim(
      (offset + shift).astype(jnp.bfloat16), words.shape, (0,)
    )
  pair = 2 * _PACKED_PIECE
  for row in range(top, top + plan.group, pair):
    bits = words
    if row:
      bits = jax.lax.shift_right_logical(words, row // pair * 4)
    # Both rows of a word at once; their order is that of the halves.
    bits = (bits & 0x000F000F) | base
    for half in range(2):
      part = bits
      if half:
        part = jax.lax.shift_right_logical(bits, 16)
      wide = jax.lax.bitcast_convert_type(part.astype(jnp.int16), jnp.bfloat16)
      first = block * quantize.PACKED_ROWS + row + half * _PACKED_PIECE
      hopper_matmul.multiply_registers(
        acc,
        wide - shift,
        x_tile.at[:, pl.ds(first, _PACKED_PIECE)].T,
        operands,
      )
  return acc[...]


def _of_columns(ref, *index):
  """A value per column of the matrix, which is a row of the accumulator."""
  return hopper.load(ref, index, plgpu.Layout.WGMMA.reduce(1))


def _release(empty):
  """Gives a slot back whose values were read into registers."""
  # Copies are another proxy's writes, which only a fence puts after reads.
  plgpu.commit_smem()
  plgpu.barrier_arrive(empty)


def _store(values, stage, out, row, column, wg):
  """Stores the transposed tile of a warpgroup."""
  block_rows, stored = values.shape[1], stage.shape[0]
  for top in range(0, block_rows, stored):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    part = values[:, top : top + stored].astype(stage.dtype)
    stage.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      stage,
      out.at[
        pl.ds(row * block_rows + top, stored),
        pl.ds(column * BLOCK_N + wg * _COLUMNS, _COLUMNS),
      ],
    )
