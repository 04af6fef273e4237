"""linear_cross_entropy on a Hopper GPU, a chunk of tokens at a time.

A kernel (`pallas_gpu_forward`) finds the softmax statistics of every token and
tile of the vocabulary; XLA merges the tiles. Where the call is differentiated
the kernel keeps a chunk's exponentials, in the dtype of x; XLA turns them into
the gradient of the logits in one pass, and its matrix products take that, head
and x: three products with the head in all. Cut Cross-Entropy (Wijmans et al.,
https://arxiv.org/abs/2411.09009, algorithms 2 and 3) keeps nothing and
recomputes the logits, which makes four: a third more of what takes the time.
Keeping them moves 10 bytes per token and column, a tenth of the time of the
products at D = 4096, most of it under them.

Cost: 6 T D V FLOPs with gradients, 2 T D V without. HBM: per chunk the head
twice, its float32 gradient in and out (once out, in its own dtype, if one chunk
is all), and C V exponentials out, in and out again, and in twice. Memory: a
chunk's exponentials, which the gradient of the logits replaces and the next
chunk reuses, 2 C V bytes, are the only array of the size of logits.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.linear_cross_entropy import pallas_gpu_forward as forward
from pallas_kernels.linear_cross_entropy import pallas_tpu_blocks
from pallas_kernels.linear_cross_entropy import totals
from pallas_kernels.linear_cross_entropy.gradient import with_gradients

_OP = 'linear_cross_entropy'
_DTYPES = (jnp.bfloat16, jnp.float16)
# The float32 gradient of head passes HBM per chunk, 8 D V bytes: at 4096 tokens
# 5% of the time of the products.
_CHUNK = 4096
# Tokens and columns of a tile. Where rows of head have no whole swizzle of 128
# bytes, the registers do not hold the largest.
_TILES = ((256, 192), (128, 256), (128, 128))
_STAGES, _GROUP_TOKENS = 4, 2048
# What an SM reads from L2 in a cycle if all do: 5120 bytes together, as NVIDIA
# says of the A100 (white paper, from memory); of Hopper it does not say.
_L2_BYTES, _SM_FLOPS = 5120 / 132, 4096
# Fewer columns of head than this are no swizzle's width.
_MIN_SWIZZLE = 16
_SIZES = 'block_tokens', 'block_vocab', 'stages', 'group'
# Of tokens: TMA wants whole ones.
_ROWS = 8


def linear_cross_entropy(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  vocab_axes: tuple[str, ...] = (),
  **kwargs: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """See `api.linear_cross_entropy`."""
  kwargs['vocab_axes'] = vocab_axes
  return with_gradients(
    functools.partial(linear_cross_entropy_value, **kwargs),
    functools.partial(linear_cross_entropy_gradients, **kwargs),
    x,
    head,
    targets,
    weights,
    vocab_axes,
  )


def features(x, head, *args, **kwargs) -> dict[str, Any]:
  """What describes an input, as in tuned.json."""
  del args, kwargs
  return pallas_tpu_blocks.features(x, head)


def candidates(chip, x, head, *args, **kwargs) -> list[dict[str, int]]:
  """Configurations for the tuner to try."""
  del chip, args, kwargs
  tried = [
    dict(
      chunk=chunk,
      block_tokens=block_tokens,
      block_vocab=block_vocab,
      stages=stages,
      group=group,
    )
    for chunk in (2048, 4096, 8192)
    for block_tokens, block_vocab in (*_TILES, (256, 128))
    for stages in (3, 4)
    for group in (4, 8, 16)
  ]
  fit = lambda config: _blocks(x, head, config, keep=True)
  return [c for c in tried if c.items() <= fit(c).items()]


def linear_cross_entropy_value(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  z_loss: float = 0.0,
  logit_soft_cap: float | None = None,
  chunk: int | None = None,
  shards: tuple[int, int] = (1, 1),
  vocab_axes: tuple[str, ...] = (),
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss and the sums.

  Raises:
    NotImplementedError: Several shards, or a dtype that is not of 16 bits.
  """
  del chunk  # Nothing of the size of logits is kept.
  _check(x, shards)
  blocks = _blocks(x, head, config, keep=False)
  x, head, targets = varying.vary_alike(x, head, targets)
  run = _Statistics(blocks, head.astype(x.dtype), logit_soft_cap, vocab_axes)
  chunks = _chunks(x, targets, weights, targets.size)
  x, targets, weights = (a[0] for a in chunks)
  combined, _ = run(x, targets, keep=False)
  return totals.totals(combined, weights, z_loss)


def linear_cross_entropy_gradients(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  z_loss: float = 0.0,
  logit_soft_cap: float | None = None,
  chunk: int | None = None,
  shards: tuple[int, int] = (1, 1),
  vocab_axes: tuple[str, ...] = (),
  config: Mapping[str, int] | None = None,
) -> tuple[Any, tuple[jax.Array, ...]]:
  """The loss and the sums, and the gradients of x, head and weights.

  Raises:
    NotImplementedError: Several shards, or a dtype that is not of 16 bits.
  """
  _check(x, shards)
  blocks = _blocks(x, head, config, keep=True)
  chunk = blocks['chunk'] if chunk is None else chunk * x.shape[0]
  given_x, given_head, given_weights = x, head, weights
  x, head, targets = varying.vary_alike(x, head, targets)
  chunks = _chunks(x, targets, weights, chunk)
  num_chunks = chunks[0].shape[0]
  run = _Statistics(blocks, head.astype(x.dtype), logit_soft_cap, vocab_axes)
  step = functools.partial(_chunk_gradients, run, z_loss)
  # The first chunk has nothing to add to; if it is all, it has the result.
  dtype = jnp.float32 if num_chunks > 1 else given_head.dtype
  d_head, output = step(tuple(a[0] for a in chunks), None, dtype)
  output = jax.tree.map(lambda a: a[None], output)
  if num_chunks > 1:
    d_head, outputs = jax.lax.scan(
      lambda d_head, chunk: step(chunk, d_head, dtype),
      d_head,
      tuple(a[1:] for a in chunks),
    )
    output = jax.tree.map(lambda *a: jnp.concatenate(a), output, outputs)
  d_x, combined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), output)
  result = totals.totals(combined, chunks[2].reshape(-1), z_loss)
  d_weights = totals.d_weights(combined, z_loss)[: given_weights.size]
  return result, (
    d_x[: given_weights.size].reshape(given_x.shape),
    d_head.astype(given_head.dtype),
    d_weights.reshape(given_weights.shape).astype(given_weights.dtype),
  )


class _Statistics:
  """Runs the kernel on chunks of tokens.

  Attributes:
    head: `[D, V]`, of the dtype of x.
    soft_cap: See the op.
  """

  def __init__(self, blocks, head, soft_cap, vocab_axes):
    self.head, self.soft_cap = head, soft_cap
    self._vocab_axes = vocab_axes
    self._sizes = {k: blocks[k] for k in _SIZES}
    width, num_vocab = head.shape
    fits = num_vocab % _MIN_SWIZZLE == 0
    self._padding = (
      -width % forward.DEPTH,
      0 if fits else -num_vocab % forward.DEPTH,
    )
    self._padded = jnp.pad(head, [(0, n) for n in self._padding])

  def __call__(self, x, targets, keep):
    """What `totals.combine` returns, and the gradient of logits."""
    local = totals.local(targets, self.head, self._vocab_axes)
    num_vocab = self.head.shape[1]
    stats, exp = forward.statistics(
      jnp.pad(x, ((0, 0), (0, self._padding[0]))),
      self._padded,
      local,
      num_vocab=num_vocab,
      soft_cap=self.soft_cap,
      keep=keep,
      **self._sizes,
    )
    of_tiles = stats[:, forward.LARGEST]
    largest = of_tiles.max(0)
    exp_sum = stats[:, forward.EXP_SUM] * jnp.exp(of_tiles - largest)
    target = stats[:, forward.TARGET].sum(0)
    combined = totals.combine(
      (largest, exp_sum.sum(0), target), self._vocab_axes
    )

    def d_logits(slope, hits):
      """`softmax * slope - hits` at the targets, in the dtype of x."""
      scale = jnp.exp(of_tiles - combined[0]) * slope
      d = exp.reshape(len(x), len(of_tiles), -1).astype(jnp.float32)
      d = (d * scale.T[:, :, None]).reshape(len(x), -1)[:, :num_vocab]
      column = jax.lax.broadcasted_iota(jnp.int32, d.shape, 1)
      d -= jnp.where(column == local[:, None], hits[:, None], 0.0)
      return d.astype(x.dtype)

    return combined, d_logits


def _chunk_gradients(run, z_loss, chunk, d_head, dtype):
  """Gradient of head, with `d_head` added; of x, and combined statistics."""
  x, targets, weights = chunk
  combined, d_logits = run(x, targets, keep=True)
  normaliser, target, _ = combined
  hits = weights
  if run.soft_cap is not None:
    hits = hits * (1 - jnp.square(target / run.soft_cap))
  slope = (1 + 2 * z_loss * normaliser) * weights
  d_logits = d_logits(*(varying.vary_as(a, x) for a in (slope, hits)))
  product = lambda a, b, contract, dtype: jax.lax.dot_general(
    a, b, ((contract, contract), ((), ())), preferred_element_type=dtype
  )
  d_x = product(d_logits, run.head, (1,), x.dtype)
  d_head_c = product(x, d_logits, (0,), dtype)
  d_head = d_head_c if d_head is None else d_head + d_head_c
  return d_head, (d_x, combined)


def _check(x, shards):
  totals.check(shards)
  if x.dtype not in _DTYPES:
    raise NotImplementedError(
      f'x is {x.dtype.name}, and WGMMA is as exact for bfloat16 and float16'
    )


def _blocks(x, head, config, keep):
  """Sizes of tiles, of the ring and of chunks."""
  gpu = hopper.current()
  if config is None:
    config = tuned.lookup(
      _OP, gpu.name, features(x, head), function=f'{_OP}_gradients'
    )
  num_tokens = math.prod(x.shape[:-1])
  chunk = min(config.get('chunk', _CHUNK), num_tokens)
  # As even as the number of chunks allows.
  chunk = -(-num_tokens // -(-num_tokens // chunk))
  tokens, vocab = _tile(chunk, head.shape[1], gpu.num_sms)
  tokens = config.get('block_tokens', tokens)
  vocab = min(config.get('block_vocab', vocab), _whole(head.shape[1]))
  stages = config.get('stages', _STAGES)
  size = lambda stages: forward.smem_bytes(
    tokens, vocab, stages, keep, x.dtype.itemsize
  )
  while stages > 2 and size(stages) > gpu.smem_bytes:
    stages -= 1
  return dict(
    chunk=-(-chunk // tokens) * tokens,
    block_tokens=tokens,
    block_vocab=vocab,
    stages=stages,
    group=config.get('group', max(_GROUP_TOKENS // tokens, 1)),
  )


def _whole(num_vocab):
  return -(-num_vocab // forward.PIECE) * forward.PIECE


def _tile(num_tokens, num_vocab, num_sms):
  """The tile for which all SMs are done first: by products, or by L2."""

  def cycles(tile):
    tokens, vocab = tile[0], min(tile[1], _whole(num_vocab))
    waves = math.ceil(
      math.ceil(num_tokens / tokens) * math.ceil(num_vocab / vocab) / num_sms
    )
    products = 2 * tokens * vocab / _SM_FLOPS
    return waves * max(products, (tokens + vocab) * 2 / _L2_BYTES)

  padded = num_vocab % _MIN_SWIZZLE != 0
  whole = padded or num_vocab % forward.DEPTH == 0
  return min(_TILES if whole else _TILES[1:], key=cycles)


def _chunks(x, targets, weights, chunk):
  """`[n, C, D]` and twice `[n, C]`, padded with zeros."""
  num_tokens = targets.size
  num_chunks = -(-num_tokens // chunk)
  if num_chunks == 1:
    chunk = num_tokens
  chunk = -(-chunk // _ROWS) * _ROWS
  padding = num_chunks * chunk - num_tokens
  x = jnp.pad(x.reshape(num_tokens, -1), ((0, padding), (0, 0)))
  rest = (
    jnp.pad(a.reshape(-1), (0, padding)).reshape(num_chunks, chunk)
    for a in (targets, weights.astype(jnp.float32))
  )
  return x.reshape(num_chunks, chunk, -1), *rest
