"""TPU kernel: gradients of x and head from a chunk's exponentials.

With the exponentials that the forward kernel kept, the softmax is a product
with a factor per token. Its gradient P (vocabulary by tokens) stays in VMEM for
both products that need it: d_x += P head and d_head += x P. Everything is
turned so that neither needs a transposition, so x comes and its gradient leaves
as [D, C].

Cost: 4 C D V FLOPs per chunk of C tokens. HBM: per block of D all C V
exponentials; the head once, its float32 gradient read and written once. VMEM: a
block of x and its gradient for all C tokens, two tiles of the others.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import varying
from pallas_kernels.linear_cross_entropy import pallas_tpu_forward as forward

_STRIP_TOKENS = 256


def gradients(
  x: jax.Array,
  head: jax.Array,
  exp: jax.Array,
  scale: jax.Array,
  targets: jax.Array,
  hits: jax.Array,
  d_head: jax.Array | None,
  *,
  final_dtype: DTypeLike | None,
  block_width: int,
  block_vocab: int,
  rows: int,
  vmem_bytes: int,
) -> tuple[jax.Array, jax.Array]:
  """Gradients for `d_logits = exp * scale - hits at the targets`.

  Args:
    x: `[D, C]`.
    head: `[D, V]`, of the dtype of `x`.
    exp: `[num_tiles * block_vocab, C]`, from `pallas_tpu_forward.statistics`.
    scale: `[num_tiles, 8, C]`, factors of each tile's strips.
    targets: `[1, C]`.
    hits: `[1, C]`.
    d_head: Float32 `[D, num_tiles * block_vocab]` to add to; `None` is 0.
    final_dtype: Of the gradient of head; `None` makes one to go on adding to.
    block_width: Rows of x and head in VMEM.
    block_vocab: Columns of a tile of the head, as `exp` was made with.
    rows: Rows of x and head whose product is one piece of the program.
    vmem_bytes: What the kernel may use.

  Returns:
    Float32 gradient `[D, C]` of x; that of head, `[D, V]` if final, else like
    `d_head`, whose memory it takes.
  """
  width, num_tokens = x.shape
  num_vocab = head.shape[1]
  num_tiles = pl.cdiv(num_vocab, block_vocab)
  whole = lambda i, j: (0, 0)
  x_spec = pl.BlockSpec(
    (block_width, num_tokens), lambda i, j: (i, 0), pipeline_mode=pl.Buffered(1)
  )
  tile_spec = pl.BlockSpec((block_width, block_vocab), lambda i, j: (i, j))
  in_specs = [
    *(x_spec, tile_spec),
    pl.BlockSpec((block_vocab, num_tokens), lambda i, j: (j, 0)),
    pl.BlockSpec((1, forward.NUM_ROWS, num_tokens), lambda i, j: (j, 0, 0)),
    pl.BlockSpec((1, num_tokens), whole),
    pl.BlockSpec((1, num_tokens), whole),
  ]
  args = [x, head, exp, scale, targets, hits]
  if d_head is not None:
    in_specs.append(tile_spec)
    args.append(d_head)
  if final_dtype is None:
    columns, dtype = num_tiles * block_vocab, jnp.float32
  else:
    columns, dtype = num_vocab, final_dtype
  return pl.pallas_call(
    functools.partial(
      _gradients_kernel, rows=rows, last_vocab=num_vocab % block_vocab
    ),
    grid=(width // block_width, num_tiles),
    in_specs=in_specs,
    out_specs=[x_spec, tile_spec],
    out_shape=[
      varying.shape((width, num_tokens), jnp.float32, x),
      varying.shape((width, columns), dtype, x),
    ],
    scratch_shapes=[
      pltpu.VMEM((block_vocab, num_tokens), x.dtype),
      pltpu.VMEM((2, rows, block_vocab), jnp.float32),
    ],
    input_output_aliases={6: 1} if len(args) > 6 and not final_dtype else {},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=vmem_bytes,
    ),
    name='linear_cross_entropy_gradients',
  )(*args)


def _gradients_kernel(
  x_ref,
  head_ref,
  exp_ref,
  scale_ref,
  target_ref,
  hit_ref,
  *refs,
  rows,
  last_vocab,
):
  *d_head_in, d_x_ref, d_head_ref, d_logits_ref, sum_ref = refs
  step = pl.program_id(1)
  block_width, num_tokens = x_ref.shape
  block_vocab = head_ref.shape[1]
  strip_tokens = math.gcd(_STRIP_TOKENS, num_tokens)
  row_blocks = block_width // rows

  if last_vocab:
    # There is anything beyond the head's edge: times 0 it may be NaN.
    @pl.when(step == pl.num_programs(1) - 1)
    def _():
      column = jax.lax.broadcasted_iota(jnp.int32, (rows, block_vocab), 1)

      def clear(r, _):
        part = pl.ds(pl.multiple_of(r * rows, rows), rows)
        head_ref[part, :] = jnp.where(
          column < last_vocab, head_ref[part, :], jnp.zeros((), head_ref.dtype)
        )
        return 0

      jax.lax.fori_loop(0, row_blocks, clear, 0)

  @pl.when(step == 0)
  def _():
    def clear(r, _):
      part = pl.ds(pl.multiple_of(r * 8, 8), 8)
      d_x_ref[part, :] = jnp.zeros((8, num_tokens), jnp.float32)
      return 0

    jax.lax.fori_loop(0, block_width // 8, clear, 0)

  def normalise(k, _):
    tokens = pl.ds(pl.multiple_of(k * strip_tokens, strip_tokens), strip_tokens)
    for strip in range(block_vocab // forward.STRIP_VOCAB):
      vocab = pl.ds(strip * forward.STRIP_VOCAB, forward.STRIP_VOCAB)
      exp = exp_ref[vocab, tokens].astype(jnp.float32)
      first = step * block_vocab + strip * forward.STRIP_VOCAB
      is_target = (
        jax.lax.broadcasted_iota(jnp.int32, exp.shape, 0)
        == target_ref[:, tokens] - first
      )
      d_logits = exp * scale_ref[0, strip : strip + 1, tokens] - jnp.where(
        is_target, hit_ref[:, tokens], 0.0
      )
      d_logits_ref[vocab, tokens] = d_logits.astype(d_logits_ref.dtype)
    return 0

  jax.lax.fori_loop(0, num_tokens // strip_tokens, normalise, 0)

  def multiply(r, _):
    part = pl.ds(pl.multiple_of(r * rows, rows), rows)
    for vocab in forward.pieces(block_vocab):
      d_x_ref[part, :] += forward.product(
        head_ref[part, vocab], d_logits_ref[vocab, :], (1, 0)
      )
    # A place that varies stays in memory: in registers it would spill.
    slot = r % 2
    depths = forward.pieces(num_tokens)
    for i, tokens in enumerate(depths):
      d_head = forward.product(
        x_ref[part, tokens], d_logits_ref[:, tokens], (1, 1)
      )
      if i:
        d_head = sum_ref[slot] + d_head
      elif d_head_in:
        d_head = d_head_in[0][part, :] + d_head
      if i < len(depths) - 1:
        sum_ref[slot] = d_head
      else:
        d_head_ref[part, :] = d_head.astype(d_head_ref.dtype)
    return 0

  jax.lax.fori_loop(0, row_blocks, multiply, 0)
