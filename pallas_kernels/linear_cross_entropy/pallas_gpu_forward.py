"""Hopper kernel: softmax statistics of x @ head, a tile of logits at a time.

Each block computes tiles of up to 256 tokens by 192 columns, one after another:
one warpgroup keeps a ring of pieces of x and head ahead by TMA, two multiply
half of the tokens each by WGMMA and reduce their logits in registers, so that
none reach HBM. Statistics are per tile and relative to its own largest logit,
as those of parts of a softmax (Milakov and Gimelshein, "Online normalizer
calculation for softmax", https://arxiv.org/abs/1805.02867, section 3.1): no
tile waits for another, and the vocabulary is spread over all SMs.

For the gradient the exponentials are written too, in the dtype of x and
relative to the largest of their tile: what rounding does to them is what it
does to probabilities.

Cost: 2 T D V FLOPs. HBM: x and head about once where L2 holds what neighbouring
tiles share, 12 bytes of statistics per token and tile, T V exponentials if
asked for. L2: a tile of 256 x 192 reads 56 KiB per 1536 cycles of products.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import varying

LARGEST, EXP_SUM, TARGET = range(3)
_NUM_STATS = 3
_LOWEST = -1e30
# Of the products' common dimension, per stage: what a swizzle spans.
DEPTH = 64
# Columns whose exponentials are in registers at a time, and how many times they
# are in shared memory on their way to HBM. Narrower pieces spill registers.
PIECE, _SLOTS = 64, 2
_MULTIPLIERS = 2
_PRODUCER = _MULTIPLIERS
_MULTIPLIER_REGISTERS, _PRODUCER_REGISTERS = 240, 24
# Of a block's shared memory, for statistics, targets, barriers and what
# reductions are given, in bytes.
_RESERVED = 8192


def smem_bytes(
  block_tokens: int, block_vocab: int, stages: int, keep: bool, itemsize: int
) -> int:
  """Shared memory that a block takes, at most."""
  ring = stages * (block_tokens + block_vocab) * DEPTH
  kept = _MULTIPLIERS * _SLOTS * hopper.ROWS * PIECE if keep else 0
  return (ring + kept) * itemsize + _RESERVED


def statistics(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  num_vocab: int,
  soft_cap: float | None,
  keep: bool,
  block_tokens: int,
  block_vocab: int,
  stages: int,
  group: int,
) -> tuple[jax.Array, jax.Array | None]:
  """Largest logit, sum of exponentials and target's logit of tokens and tiles.

  Args:
    x: `[C, D]`, C a multiple of 8 and D of `DEPTH`.
    head: `[D, V]`, of the dtype of `x`, V a multiple of 16.
    targets: `[C]`, below 0 for those that V does not hold.
    num_vocab: Columns of head that count, the first ones.
    soft_cap: See the op.
    keep: Whether to return the exponentials.
    block_tokens: Rows of a tile, 128 or 256.
    block_vocab: Columns of a tile, a multiple of `PIECE`; 256 tokens by 192 and
      128 by 256 fit the registers.
    stages: Pieces of x and head in shared memory.
    group: Blocks of tokens that are next to each other in time.

  Returns:
    `[num_tiles, 3, C]`: LARGEST, EXP_SUM relative to it, and TARGET, which is 0
    in tiles without it. With `keep` also the exponentials
    `[C, num_tiles * block_vocab]`, times the derivative of the soft cap; those
    of columns that do not count are anything.
  """
  num_tokens = x.shape[0]
  num_tiles = pl.cdiv(head.shape[1], block_vocab)
  blocks = pl.cdiv(num_tokens, block_tokens)
  padded = blocks * block_tokens
  targets = jnp.pad(targets, (0, padded - num_tokens), constant_values=-1)
  own = block_tokens // _MULTIPLIERS
  # TMA wants whole swizzles in a row of head, and WGMMA the same of both.
  ring = functools.partial(
    plgpu.SMEM,
    dtype=x.dtype,
    transforms=hopper.transforms(math.gcd(head.shape[1], DEPTH), x.dtype),
  )
  out = [varying.shape((num_tiles, _NUM_STATS, padded), jnp.float32, x)]
  scratch = dict(
    x_ring=ring((stages, block_tokens, DEPTH)),
    head_ring=ring((stages, DEPTH, block_vocab)),
    stats_out=plgpu.SMEM(
      (_MULTIPLIERS, own // hopper.ROWS, _NUM_STATS, hopper.ROWS), jnp.float32
    ),
    targets_in=plgpu.SMEM((_MULTIPLIERS, own), jnp.int32),
    full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    empty=plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=stages),
    targets_full=plgpu.Barrier(num_barriers=_MULTIPLIERS),
  )
  if keep:
    out.append(varying.shape((num_tokens, num_tiles * block_vocab), x.dtype, x))
    shape = _MULTIPLIERS, _SLOTS, hopper.ROWS, PIECE
    scratch['exp_out'] = hopper.tile(shape, x.dtype)
  stats, *exp = hopper.kernel(
    functools.partial(
      _kernel,
      grid=(blocks, num_tiles),
      group=group,
      num_vocab=num_vocab,
      soft_cap=soft_cap,
    ),
    name='linear_cross_entropy_statistics',
    out=out,
    grid=dict(block=min(hopper.current().num_sms, blocks * num_tiles)),
    scratch=scratch,
    warpgroups=_MULTIPLIERS + 1,
  )(x, head, targets)
  return stats[:, :, :num_tokens], exp[0] if keep else None


def _kernel(
  x_ref,
  head_ref,
  target_ref,
  stats_ref,
  *exp_refs,
  grid,
  group,
  num_vocab,
  soft_cap,
  x_ring,
  head_ring,
  full,
  empty,
  targets_in,
  targets_full,
  stats_out,
  exp_out=None,
):
  warpgroup = jax.lax.axis_index('wg')
  block, num_blocks = jax.lax.axis_index('block'), jax.lax.axis_size('block')
  stages, block_tokens, _ = x_ring.shape
  block_vocab = head_ring.shape[2]
  own = block_tokens // _MULTIPLIERS
  steps = pl.cdiv(x_ref.shape[1], DEPTH)

  def for_each_tile(body):
    def run(i, _):
      i_tokens, i_vocab = plgpu.planar_snake(
        block + i * num_blocks, grid, minor_dim=0, tile_width=group
      )
      body(i * steps, i_tokens, i_vocab)

    num_tiles = grid[0] * grid[1]
    count = (num_tiles - block + num_blocks - 1) // num_blocks
    jax.lax.fori_loop(0, count, run, None)

  def absorb(logits, targets_ref, first_row, i_vocab):
    start = i_vocab * block_vocab
    for i in range(own // hopper.ROWS):
      part = slice(i * hopper.ROWS, (i + 1) * hopper.ROWS)
      rows = pl.ds(first_row + part.start, hopper.ROWS)
      targets = plgpu.layout_cast(
        targets_ref[part], plgpu.Layout.WGMMA.reduce(1)
      )
      pieces = _pieces(
        logits[part],
        num_vocab - start if num_vocab % block_vocab else None,
        soft_cap,
      )
      keep = lambda j, exp, rows=rows: _keep(
        exp, exp_refs[0], exp_out.at[warpgroup], rows, start + j * PIECE, j
      )
      _reduce(
        pieces,
        targets - start,
        soft_cap,
        stats_out.at[warpgroup, i],
        keep if exp_refs else None,
      )
      plgpu.copy_smem_to_gmem(
        stats_out.at[warpgroup, i], stats_ref.at[i_vocab, :, rows]
      )

  @pl.when(warpgroup == _PRODUCER)
  def _():
    plgpu.set_max_registers(_PRODUCER_REGISTERS, action='decrease')

    def fetch(before, i_tokens, i_vocab):
      rows = pl.ds(i_tokens * block_tokens, block_tokens)
      columns = pl.ds(i_vocab * block_vocab, block_vocab)

      def step(k, _):
        slot = jax.lax.rem(before + k, stages)
        pl.when(before + k >= stages)(
          lambda: plgpu.barrier_wait(empty.at[slot])
        )
        depth = pl.ds(k * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(
          x_ref.at[rows, depth], x_ring.at[slot], full.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          head_ref.at[depth, columns], head_ring.at[slot], full.at[slot]
        )

      jax.lax.fori_loop(0, steps, step, None)

    for_each_tile(fetch)

  @pl.when(warpgroup < _MULTIPLIERS)
  def _():
    plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action='increase')
    own_rows = pl.ds(warpgroup * own, own)

    def multiply(before, acc):
      def step(k, _):
        slot = jax.lax.rem(before + k, stages)
        plgpu.barrier_wait(full.at[slot])
        plgpu.wgmma(acc, x_ring.at[slot, own_rows], head_ring.at[slot])
        # All but the last product are done, and what they read is free.
        plgpu.wgmma_wait(1)

        @pl.when(k > 0)
        def _():
          plgpu.barrier_arrive(empty.at[jax.lax.rem(before + k - 1, stages)])

      jax.lax.fori_loop(0, steps, step, None)
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(empty.at[jax.lax.rem(before + steps - 1, stages)])
      return acc[...]

    def tile(before, i_tokens, i_vocab):
      first_row = i_tokens * block_tokens + own_rows.start
      targets_ref, arrived = (
        a.at[warpgroup] for a in (targets_in, targets_full)
      )
      plgpu.copy_gmem_to_smem(
        target_ref.at[pl.ds(first_row, own)], targets_ref, arrived
      )
      logits = pl.run_scoped(
        functools.partial(multiply, before), plgpu.ACC((own, block_vocab))
      )
      plgpu.barrier_wait(arrived)
      # What the tile before left has long been read.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      absorb(logits, targets_ref, first_row, i_vocab)

    for_each_tile(tile)
    plgpu.wait_smem_to_gmem(0)


def _along_rows(a, like):
  return jax.lax.broadcast_in_dim(a, like.shape, (0,))


def _columns(like):
  return plgpu.broadcasted_iota(
    jnp.int32, like.shape, 1, layout=plgpu.Layout.WGMMA
  )


def _pieces(logits, num_left, soft_cap):
  """Logits of a few columns each, capped, low from column `num_left` on."""
  pieces = []
  for start in range(0, logits.shape[1], PIECE):
    piece = logits[:, start : start + PIECE]
    if soft_cap is not None:
      # c * tanh(logits / c), from exp2 and rsqrt: tanh's unit has 11 bits.
      power = jnp.exp2(piece * (2 / soft_cap * hopper.LOG2_E))
      root = jax.lax.rsqrt(power + 1.0)
      piece = soft_cap - 2 * soft_cap * root * root
    if num_left is not None:
      piece = jnp.where(_columns(piece) < num_left - start, piece, _LOWEST)
    pieces.append(piece)
  return pieces


def _reduce(pieces, targets, soft_cap, stats_ref, keep):
  """Statistics to shared memory, and each piece's exponentials to `keep`."""
  largest = functools.reduce(
    jnp.maximum, [jnp.max(piece, axis=1) for piece in pieces]
  )
  target, exp_sum = 0.0, 0.0
  for i, piece in enumerate(pieces):
    hit = _columns(piece) == _along_rows(targets - i * PIECE, piece)
    target += jnp.sum(jnp.where(hit, piece, 0.0), axis=1)
  stats_ref[LARGEST] = largest
  stats_ref[TARGET] = target
  for i, piece in enumerate(pieces):
    exp = jnp.exp2(
      piece * hopper.LOG2_E - _along_rows(largest * hopper.LOG2_E, piece)
    )
    exp_sum += jnp.sum(exp, axis=1)
    if keep is not None:
      if soft_cap is not None:
        exp = exp * (1 - jnp.square(piece * (1 / soft_cap)))
      keep(i, exp)
  stats_ref[EXP_SUM] = exp_sum
  plgpu.commit_smem()


def _keep(exp, exp_ref, exp_out, rows, start, i):
  """Sends piece i of the exponentials to HBM."""
  out = exp_out.at[i % _SLOTS]
  plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
  out[...] = exp.astype(out.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out, exp_ref.at[rows, pl.ds(start, PIECE)])
