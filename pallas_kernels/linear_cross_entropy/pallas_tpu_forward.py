"""TPU kernel: softmax statistics of x @ head, tile by tile of the vocabulary.

Online softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867,
algorithm 3) over the tiles of the head that pass by a block of tokens in VMEM.
For the gradient it also writes each tile's exponentials, in the dtype of x and
relative to the largest logit so far: what rounding does to them is what it does
to probabilities.

A step multiplies one tile and, in the shadow of that product, exponentiates the
logits of the tile before it, turned so that tokens lie along lanes: then
maxima, sums and the comparison with the target are cheap.

Cost: 2 T D V FLOPs. HBM: the head once per block of tokens, x once, T V
exponentials if asked for. VMEM: a block of tokens, two tiles of the head, two
tiles of logits.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import varying

LOWEST = -1e30
# Part of a tile whose exponentials are in registers at a time.
STRIP_TOKENS = 128
STRIP_VOCAB = 128
# Depth of a product whose result goes to VMEM.
_DEPTH = 256
# Rows of the statistics: those of a tile's strips, and those of a token.
NUM_ROWS = 8
LARGEST, EXP_SUM, TARGET = range(3)


def statistics(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  *,
  soft_cap: float | None,
  keep: bool,
  block_tokens: int,
  block_vocab: int,
  rows: int,
  vmem_bytes: int,
) -> tuple[jax.Array, ...]:
  """Largest logit, sum of exponentials and target's logit of each token.

  Args:
    x: `[C, D]`, C a multiple of `block_tokens`.
    head: `[D, V]`, of the dtype of `x`.
    targets: `[1, C]`, below 0 for those that V does not hold.
    soft_cap: See the op.
    keep: Whether to return the exponentials.
    block_tokens: Tokens in VMEM.
    block_vocab: Columns of a tile of the head.
    rows: Tokens whose product is one piece of the program.
    vmem_bytes: What the kernel may use.

  Returns:
    `[8, C]`, of which rows LARGEST, EXP_SUM (relative to the largest) and
    TARGET (0 if V does not hold it) count. With `keep` also the exponentials
    `[num_tiles * block_vocab, C]`, times the derivative of the soft cap, and
    `[num_tiles, 8, C]`, in row s what strip s of the tile is relative to.
  """
  num_tokens, width = x.shape
  num_tiles = pl.cdiv(head.shape[1], block_vocab)
  before = lambda j: jnp.maximum(j - 1, 0)
  out_specs = [pl.BlockSpec((NUM_ROWS, block_tokens), lambda i, j: (0, i))]
  out_shape = [varying.shape((NUM_ROWS, num_tokens), jnp.float32, x)]
  if keep:
    out_specs += [
      pl.BlockSpec((block_vocab, block_tokens), lambda i, j: (before(j), i)),
      pl.BlockSpec((1, NUM_ROWS, block_tokens), lambda i, j: (before(j), 0, i)),
    ]
    out_shape += [
      varying.shape((num_tiles * block_vocab, num_tokens), x.dtype, x),
      varying.shape((num_tiles, NUM_ROWS, num_tokens), jnp.float32, x),
    ]
  return pl.pallas_call(
    functools.partial(
      _statistics_kernel,
      num_vocab=head.shape[1],
      soft_cap=soft_cap,
      rows=rows,
    ),
    grid=(num_tokens // block_tokens, num_tiles + 1),
    in_specs=[
      pl.BlockSpec(
        (block_tokens, width),
        lambda i, j: (i, 0),
        pipeline_mode=pl.Buffered(1),
      ),
      pl.BlockSpec(
        (width, block_vocab), lambda i, j: (0, jnp.minimum(j, num_tiles - 1))
      ),
      pl.BlockSpec((1, block_tokens), lambda i, j: (0, i)),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[pltpu.VMEM((2, block_tokens, block_vocab), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=vmem_bytes,
    ),
    name='linear_cross_entropy_statistics',
  )(x, head, targets)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Product over the given dimensions, accumulated in float32."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def pieces(size: int, most: int = _DEPTH) -> list[slice]:
  """Splits a dimension into slices of at most `most`."""
  return [slice(k, min(k + most, size)) for k in range(0, size, most)]


def _statistics_kernel(
  x_ref, head_ref, target_ref, stats_ref, *refs, num_vocab, soft_cap, rows
):
  *kept, logits_ref = refs
  step = pl.program_id(1)
  now, before = step % 2, (step + 1) % 2
  block_tokens, width = x_ref.shape
  block_vocab = head_ref.shape[1]
  depths = pieces(width)

  @pl.when(step == 0)
  def _():
    stats_ref[...] = jnp.zeros_like(stats_ref)
    stats_ref[LARGEST : LARGEST + 1, :] = jnp.full(
      (1, block_tokens), LOWEST, jnp.float32
    )

  def absorb(tokens, strip):
    vocab = slice(strip * STRIP_VOCAB, (strip + 1) * STRIP_VOCAB)
    first = (step - 1) * block_vocab + vocab.start
    logits = logits_ref[before, tokens, vocab].T
    if soft_cap is not None:
      logits = soft_cap * jnp.tanh(logits * (1 / soft_cap))
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    # The first step has no logits: what it sums vanishes with the next one's.
    num_valid = jnp.where(step == 0, 0, num_vocab - first)
    logits = jnp.where(token < num_valid, logits, LOWEST)
    old = stats_ref[LARGEST : LARGEST + 1, tokens]
    new = jnp.maximum(old, jnp.max(logits, axis=0, keepdims=True))
    is_target = token == target_ref[:, tokens] - first
    exp = jnp.exp(logits - new)
    stats_ref[TARGET : TARGET + 1, tokens] += jnp.sum(
      jnp.where(is_target, logits, 0.0), axis=0, keepdims=True
    )
    stats_ref[LARGEST : LARGEST + 1, tokens] = new
    stats_ref[EXP_SUM : EXP_SUM + 1, tokens] = stats_ref[
      EXP_SUM : EXP_SUM + 1, tokens
    ] * jnp.exp(old - new) + jnp.sum(exp, axis=0, keepdims=True)
    if kept:
      exp_ref, relative_ref = kept
      if soft_cap is not None:
        slope = 1 - jnp.square(logits * (1 / soft_cap))
        exp = exp * jnp.maximum(slope, 0.0)  # Of masked ones it is -inf.
      exp_ref[vocab, tokens] = exp.astype(exp_ref.dtype)
      relative_ref[0, strip : strip + 1, tokens] = new

  def run(r, _):
    start = pl.multiple_of(r * rows, rows)
    strips = [
      (pl.ds(pl.multiple_of(start + t, STRIP_TOKENS), STRIP_TOKENS), strip)
      for strip in range(block_vocab // STRIP_VOCAB)
      for t in range(0, rows, STRIP_TOKENS)
    ]
    tokens = pl.ds(start, rows)
    for i, depth in enumerate(depths):
      share = slice(
        i * len(strips) // len(depths), (i + 1) * len(strips) // len(depths)
      )
      for strip in strips[share]:
        absorb(*strip)
      logits = product(x_ref[tokens, depth], head_ref[depth, :], (1, 0))
      if i:
        logits = logits_ref[now, tokens, :] + logits
      logits_ref[now, tokens, :] = logits
    return 0

  jax.lax.fori_loop(0, block_tokens // rows, run, 0)
