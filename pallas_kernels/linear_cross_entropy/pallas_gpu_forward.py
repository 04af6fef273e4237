"""Hopper kernel: softmax statistics of x @ head, a tile of logits at a time.

Each block computes tiles of 128 tokens by up to 256 columns, one after another:
one warpgroup keeps a ring of pieces of x and head ahead by TMA, two multiply 64
tokens each by WGMMA and reduce their logits in registers, so that none reach
HBM. Statistics are per tile and relative to its own largest logit, as those of
parts of a softmax (Milakov and Gimelshein, "Online normalizer calculation for
softmax", https://arxiv.org/abs/1805.02867, section 3.1): no tile waits for
another, and the vocabulary is spread over all SMs.

For the gradient the exponentials are written too, in the dtype of x and
relative to the largest of their tile: what rounding does to them is what it
does to probabilities.

Cost: 2 T D V FLOPs. HBM: x and head about once where L2 holds what neighbouring
tiles share, 12 bytes of statistics per token and tile, T V exponentials if
asked for. What is read from L2 is 48 KiB per 1024 cycles of products.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import varying

# Of tokens: two warpgroups' shares.
BLOCK_TOKENS = 2 * hopper.ROWS
LARGEST, EXP_SUM, TARGET = range(3)
_NUM_STATS = 3
_LOWEST = -1e30
# Of the products' common dimension, per stage: what a swizzle spans.
DEPTH = 64
# Columns of exponentials on their way to HBM at a time, and how many times.
_PIECE, _SLOTS = 32, 2
_MULTIPLIERS = 2
_PRODUCER = _MULTIPLIERS
_MULTIPLIER_REGISTERS, _PRODUCER_REGISTERS = 232, 40
# Of a block's shared memory, for statistics, targets and barriers.
_RESERVED = 6144


def smem_bytes(block_vocab: int, stages: int, keep: bool, itemsize: int) -> int:
  """Shared memory that a block takes, at most."""
  ring = stages * (BLOCK_TOKENS + block_vocab) * DEPTH
  kept = BLOCK_TOKENS * _SLOTS * _PIECE if keep else 0
  return (ring + kept) * itemsize + _RESERVED


def statistics(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  num_vocab: int,
  soft_cap: float | None,
  keep: bool,
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
    block_vocab: Columns of a tile, a multiple of 64 and at most 256.
    stages: Pieces of x and head in shared memory.
    group: Blocks of tokens that are next to each other in time.

  Returns:
    `[num_tiles, 3, C]`: LARGEST, EXP_SUM relative to it, and TARGET, which is 0
    in tiles without it. With `keep` also the exponentials
    `[C, num_tiles * block_vocab]`, times the derivative of the soft cap.
  """
  num_tokens = x.shape[0]
  num_tiles = pl.cdiv(num_vocab, block_vocab)
  blocks = pl.cdiv(num_tokens, BLOCK_TOKENS)
  padded = blocks * BLOCK_TOKENS
  targets = jnp.pad(targets, (0, padded - num_tokens), constant_values=-1)
  out = [varying.shape((num_tiles, _NUM_STATS, padded), jnp.float32, x)]
  # TMA wants whole swizzles in a row of head, and WGMMA the same of both.
  ring = functools.partial(
    plgpu.SMEM,
    dtype=x.dtype,
    transforms=hopper.transforms(math.gcd(head.shape[1], DEPTH), x.dtype),
  )
  scratch = dict(
    x_ring=ring((stages, BLOCK_TOKENS, DEPTH)),
    head_ring=ring((stages, DEPTH, block_vocab)),
    stats_out=plgpu.SMEM((_MULTIPLIERS, _NUM_STATS, hopper.ROWS), jnp.float32),
    targets_in=plgpu.SMEM((_MULTIPLIERS, hopper.ROWS), jnp.int32),
    full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    empty=plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=stages),
    targets_full=plgpu.Barrier(num_barriers=_MULTIPLIERS),
  )
  if keep:
    out.append(varying.shape((num_tokens, num_tiles * block_vocab), x.dtype, x))
    shape = _MULTIPLIERS, _SLOTS, hopper.ROWS, _PIECE
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
  **scratch,
):
  warpgroup = jax.lax.axis_index('wg')
  block, num_blocks = jax.lax.axis_index('block'), jax.lax.axis_size('block')
  stages, _, block_vocab = head_ring.shape
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

  @pl.when(warpgroup == _PRODUCER)
  def _():
    plgpu.set_max_registers(_PRODUCER_REGISTERS, action='decrease')

    def fetch(before, i_tokens, i_vocab):
      rows = pl.ds(i_tokens * BLOCK_TOKENS, BLOCK_TOKENS)
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
    own = pl.ds(warpgroup * hopper.ROWS, hopper.ROWS)
    targets_in = scratch['targets_in'].at[warpgroup]
    targets_full = scratch['targets_full'].at[warpgroup]
    outputs = [
      (ref, scratch[name].at[warpgroup])
      for name, ref in zip(
        ('stats_out', 'exp_out'), (stats_ref, *exp_refs), strict=False
      )
    ]

    def multiply(before, acc):
      def step(k, _):
        slot = jax.lax.rem(before + k, stages)
        plgpu.barrier_wait(full.at[slot])
        plgpu.wgmma(acc, x_ring.at[slot, own], head_ring.at[slot])
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
      rows = pl.ds(i_tokens * BLOCK_TOKENS + own.start, hopper.ROWS)
      plgpu.copy_gmem_to_smem(target_ref.at[rows], targets_in, targets_full)
      logits = pl.run_scoped(
        functools.partial(multiply, before),
        plgpu.ACC((hopper.ROWS, block_vocab)),
      )
      if soft_cap is not None:
        logits = _cap(logits, soft_cap)
      start = i_vocab * block_vocab
      column = plgpu.broadcasted_iota(
        jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
      )
      if num_vocab % block_vocab:
        logits = jnp.where(column < num_vocab - start, logits, _LOWEST)
      plgpu.barrier_wait(targets_full)
      targets = plgpu.layout_cast(targets_in[...], plgpu.Layout.WGMMA.reduce(1))
      _absorb(
        logits, column, targets - start, (rows, i_vocab), soft_cap, outputs
      )

    for_each_tile(tile)
    plgpu.wait_smem_to_gmem(0)


def _along_rows(a, like):
  return jax.lax.broadcast_in_dim(a, like.shape, (0,))


def _cap(logits, soft_cap):
  """c * tanh(logits / c), from exp2 and rsqrt: tanh's unit has 11 bits."""
  power = jnp.exp2(logits * (2 / soft_cap * hopper.LOG2_E))
  root = jax.lax.rsqrt(power + 1.0)
  return soft_cap - 2 * soft_cap * root * root


def _absorb(logits, column, targets, place, soft_cap, outputs):
  """Statistics of a warpgroup's logits, and their exponentials, to HBM."""
  rows, i_vocab = place
  (stats_ref, stats_out), *exp_output = outputs
  largest = jnp.max(logits, axis=1)
  hit = column == _along_rows(targets, logits)
  target = jnp.sum(jnp.where(hit, logits, 0.0), axis=1)
  exp = jnp.exp2(
    logits * hopper.LOG2_E - _along_rows(largest * hopper.LOG2_E, logits)
  )
  # What the tile before left has long been read.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  stats_out[LARGEST] = largest
  stats_out[EXP_SUM] = jnp.sum(exp, axis=1)
  stats_out[TARGET] = target
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(stats_out, stats_ref.at[i_vocab, :, rows])
  for exp_ref, exp_out in exp_output:
    if soft_cap is not None:
      slope = 1 - jnp.square(logits * (1 / soft_cap))
      exp = exp * jnp.maximum(slope, 0.0)  # Of masked ones it is low.
    for i in range(logits.shape[1] // _PIECE):
      slot = i % _SLOTS
      plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
      piece = exp[:, i * _PIECE : (i + 1) * _PIECE]
      exp_out[slot] = piece.astype(exp_out.dtype)
      plgpu.commit_smem()
      start = i_vocab * logits.shape[1] + i * _PIECE
      plgpu.copy_smem_to_gmem(
        exp_out.at[slot], exp_ref.at[rows, pl.ds(start, _PIECE)]
      )
