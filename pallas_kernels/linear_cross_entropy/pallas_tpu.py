"""linear_cross_entropy on a TPU, a chunk of tokens at a time.

The forward pass of a differentiated call runs two kernels per chunk: the first
(`pallas_tpu_forward`) finds each token's log-sum-exp and keeps the chunk's
exponentials, in the dtype of x; the second (`pallas_tpu_backward`) turns them
into both gradients, three products with the head in all. Cut Cross-Entropy
(Wijmans et al., https://arxiv.org/abs/2411.09009, algorithms 2 and 3) keeps
nothing and recomputes the logits, which makes four; its filter of negligible
softmax entries needs blocks of 128 x 256 that are negligible everywhere, where
ours, for the bandwidth of a TPU, are 2,048 tokens high.

Where the vocabulary is split over mesh axes, the kernels see a shard, and only
three numbers per token are exchanged between them.

Cost: 6 T D V FLOPs with gradients, 2 T D V without. HBM: per chunk the head
twice, its float32 gradient once in and out, and C V exponentials out and in,
the only array of the size of logits, which is reused by the next chunk.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import varying
from pallas_kernels.linear_cross_entropy import pallas_tpu_backward
from pallas_kernels.linear_cross_entropy import pallas_tpu_blocks
from pallas_kernels.linear_cross_entropy import pallas_tpu_forward
from pallas_kernels.linear_cross_entropy import totals
from pallas_kernels.linear_cross_entropy.gradient import with_gradients


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
  del args, kwargs
  return pallas_tpu_blocks.candidates(chip, x, head)


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
  """The loss and the sums."""
  del chunk  # Nothing of the size of logits is kept.
  totals.check(shards)
  blocks = pallas_tpu_blocks.blocks(x, head, None, config, keep=False)
  x, head, targets = varying.vary_alike(x, head, targets)
  chunks = _chunks(x, targets, weights, blocks['chunk'])
  x, targets, weights = (a[0] for a in chunks)
  local = totals.local(targets, head, vocab_axes)
  (stats,) = _statistics(
    blocks, x, _head(head, x), local, logit_soft_cap, False
  )
  stats = totals.combine(tuple(stats[:3]), vocab_axes)
  return totals.totals(stats, weights[0], z_loss)


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
  """The loss and the sums, and the gradients of x, head and weights."""
  totals.check(shards)
  if chunk is not None:
    chunk = chunk * x.shape[0]
  blocks = pallas_tpu_blocks.blocks(x, head, chunk, config, keep=True)
  given_x, given_head, given_weights = x, head, weights
  x, head, targets = varying.vary_alike(x, head, targets)
  x, targets, weights = _chunks(x, targets, weights, blocks['chunk'])
  head = _head(head, x)
  run = functools.partial(
    _chunk_gradients, blocks, head, z_loss, logit_soft_cap, vocab_axes
  )
  chunk = lambda i: tuple(
    jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
    for a in (x, targets, weights)
  )
  # The first chunk has nothing to add to; the last one has the result's type.
  last, dtype = len(x) - 1, given_head.dtype
  outputs, d_head = [], None
  if last:
    d_head, output = run(None, chunk(0), d_head)
    outputs.append(jax.tree.map(lambda a: a[None], output))
  if last > 1:
    d_head, output = jax.lax.scan(
      lambda d_head, i: run(None, chunk(i), d_head),
      d_head,
      jnp.arange(1, last),
    )
    outputs.append(output)
  d_head, output = run(dtype, chunk(last), d_head)
  outputs.append(jax.tree.map(lambda a: a[None], output))
  outputs = jax.tree.map(lambda *a: jnp.concatenate(a), *outputs)
  d_x, stats = outputs
  stats = tuple(a.reshape(-1) for a in stats)
  loss, sums = totals.totals(stats, weights.reshape(-1), z_loss)
  d_weights = totals.d_weights(stats, z_loss)
  num_tokens = given_weights.size
  d_x = d_x.reshape(-1, d_x.shape[-1])[:num_tokens, : given_x.shape[-1]]
  return (loss, sums), (
    d_x.reshape(given_x.shape),
    d_head[: given_head.shape[0]],
    d_weights[:num_tokens]
    .reshape(given_weights.shape)
    .astype(given_weights.dtype),
  )


def _chunk_gradients(
  blocks, head, z_loss, soft_cap, vocab_axes, final_dtype, chunk, d_head
):
  """Adds a chunk to the gradient of head; gradient of x and statistics."""
  x, targets, weights = chunk
  local = totals.local(targets, head, vocab_axes)
  stats, exp, relative = _statistics(blocks, x, head, local, soft_cap, True)
  stats = totals.combine(tuple(stats[:3]), vocab_axes)
  normaliser, target, _ = stats
  slope = (1 + 2 * z_loss * normaliser) * weights[0]
  hits = weights
  if soft_cap is not None:
    hits = hits * (1 - jnp.square(target / soft_cap))
  # Rows without a strip have not been written.
  rows = jnp.arange(relative.shape[1]) < (
    blocks['block_vocab'] // pallas_tpu_forward.STRIP_VOCAB
  )
  scale = jnp.where(rows[:, None], jnp.exp(relative - normaliser) * slope, 0.0)
  d_x, d_head = pallas_tpu_backward.gradients(
    x.T,
    head,
    exp,
    scale,
    local,
    varying.vary_as(hits, x),
    d_head,
    final_dtype=final_dtype,
    block_width=blocks['block_width'],
    block_vocab=blocks['block_vocab'],
    rows=blocks['d_rows'],
    vmem_bytes=blocks['vmem_bytes'],
  )
  return d_head, (d_x.T.astype(x.dtype), stats)


def _statistics(blocks, x, head, targets, soft_cap, keep):
  return pallas_tpu_forward.statistics(
    x,
    head,
    targets,
    soft_cap=soft_cap,
    keep=keep,
    block_tokens=blocks['block_tokens'],
    block_vocab=blocks['block_vocab'],
    rows=blocks['rows'],
    vmem_bytes=blocks['vmem_bytes'],
  )


def _chunks(x, targets, weights, chunk):
  """`[n, C, D]` and twice `[n, 1, C]`, padded with zeros."""
  x = x.reshape(-1, x.shape[-1])
  num_chunks = -(-x.shape[0] // chunk)
  rows = num_chunks * chunk - x.shape[0]
  x = jnp.pad(x, ((0, rows), (0, -x.shape[1] % pallas_tpu_blocks.LANES)))
  rest = (
    jnp.pad(a.reshape(-1), (0, rows)).reshape(num_chunks, 1, chunk)
    for a in (targets, weights.astype(jnp.float32))
  )
  return x.reshape(num_chunks, chunk, -1), *rest


def _head(head, x):
  """In the dtype and of the width of padded x."""
  return jnp.pad(
    head.astype(x.dtype), ((0, x.shape[-1] - head.shape[0]), (0, 0))
  )
