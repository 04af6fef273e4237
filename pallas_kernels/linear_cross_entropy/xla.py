"""linear_cross_entropy in chunks of positions, gradients in the same pass.

They are computed chunk by chunk, while the chunk's logits exist.

A chunk is a stride of each row, not a run: position c * num_chunks + i belongs
to chunk i. Rows sharded over the mesh then stay where they are.

Cost: 6 B T D V FLOPs with gradients, 2 B T D V without; reads the head, and
reads and writes its float32 gradient, once per chunk. Memory: one chunk of
float32 logits, and the float32 gradient of the head on every shard.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import varying
from pallas_kernels.linear_cross_entropy.gradient import with_gradients

_CHUNK_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class _Config:
  z_loss: float
  logit_soft_cap: float | None
  chunk: int
  shards: tuple[int, int]
  vocab_axes: tuple[str, ...]


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


def linear_cross_entropy_value(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  **kwargs: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss and the sums."""
  config = _configure(x, **kwargs)
  return _run(config, x, head, targets, weights, with_gradients=False)[0]


def linear_cross_entropy_gradients(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  **kwargs: Any,
) -> tuple[Any, tuple[jax.Array, ...]]:
  """The loss and the sums, and the gradients of x, head and weights."""
  config = _configure(x, **kwargs)
  return _run(config, x, head, targets, weights, with_gradients=True)


def _configure(
  x,
  *,
  z_loss=0.0,
  logit_soft_cap=None,
  chunk=None,
  shards=(1, 1),
  vocab_axes=(),
):
  b, t = x.shape[0] // shards[0], x.shape[1] // shards[1]
  chunk = min(chunk or max(_CHUNK_TOKENS // b, 1), t)
  chunk = -(-t // -(-t // chunk))  # As even as the number of chunks allows.
  return _Config(
    z_loss, logit_soft_cap, chunk, tuple(shards), tuple(vocab_axes)
  )


def _run(config, x, head, targets, weights, with_gradients):
  """Returns `(loss, sums)` and the gradients of x, head and weights."""
  head_low = head.astype(x.dtype)
  chunks = tuple(
    _to_chunks(a, config) for a in (x, targets, weights.astype(jnp.float32))
  )
  num_sums = 4
  shard_shape = chunks[0].shape[1], chunks[0].shape[3]
  zeros = functools.partial(varying.zeros, dtype=jnp.float32)
  carry = (
    zeros((num_sums,), like=weights),
    zeros((*shard_shape, *head.shape), like=x) if with_gradients else None,
  )

  def body(carry, chunk):
    sums, d_head = carry
    x_c, _, weights_c = chunk
    per_token, d_logits = _chunk_loss(config, head_low, *chunk)
    _, nll, z, _ = per_token
    sums += jnp.stack([jnp.sum(a * weights_c) for a in per_token])
    if not with_gradients:
      return (sums, None), None
    # Letters: s, r shards of batch and sequence; b, t what a shard holds.
    d_x = _einsum('sbrtv,dv->sbrtd', d_logits, head_low).astype(x.dtype)
    d_head += _einsum('sbrtd,sbrtv->srdv', x_c, d_logits)
    return (sums, d_head), (d_x, nll + z)

  (sums, d_head), outputs = jax.lax.scan(body, carry, chunks)
  weight, nll, z, correct = sums
  result = nll + z, dict(weight=weight, nll=nll, z_loss=z, correct=correct)
  if not with_gradients:
    return result, None
  d_x, d_weights = (_from_chunks(a, x.shape[1], config) for a in outputs)
  d_head = d_head.sum((0, 1)).astype(head.dtype)
  return result, (d_x, d_head, d_weights.astype(weights.dtype))


def _chunk_loss(config, head, x, targets, weights):
  """(1, nll, z-loss, correct) per token, and the gradient of the logits."""
  cap = config.logit_soft_cap
  logits = _einsum('sbrtd,dv->sbrtv', x, head)
  if cap is not None:
    logits = cap * jnp.tanh(logits / cap)
  # Comparing against an iota, unlike a gather, shards over the vocabulary.
  token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  axes = config.vocab_axes
  if axes:
    targets -= jax.lax.axis_index(axes) * head.shape[1]
  is_target = token == targets[..., None]
  largest = jnp.max(logits, axis=-1, keepdims=True)
  largest = jax.lax.pmax(largest, axes) if axes else largest
  exp = jnp.exp(logits - largest)
  exp_sum = jnp.sum(exp, axis=-1, keepdims=True)
  target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
  if axes:
    exp_sum, target = jax.lax.psum((exp_sum, target), axes)
  normaliser = largest + jnp.log(exp_sum)
  slope = (1 + 2 * config.z_loss * normaliser) * weights[..., None]
  d_logits = exp * (slope / exp_sum) - is_target * weights[..., None]
  if cap is not None:
    d_logits *= 1 - jnp.square(logits / cap)
  largest, normaliser = largest[..., 0], normaliser[..., 0]
  per_token = (
    jnp.ones_like(target),
    normaliser - target,
    config.z_loss * normaliser**2,
    (target >= largest).astype(jnp.float32),
  )
  return per_token, d_logits.astype(x.dtype)


def _to_chunks(a, config):
  """[B, T, ...] to [num_chunks, S, B/S, R, chunk, ...], padded with zeros."""
  s, r = config.shards
  b, t, *rest = a.shape
  num_chunks = -(-(t // r) // config.chunk)
  padding = num_chunks * config.chunk - t // r
  a = a.reshape(s, b // s, r, t // r, *rest)
  a = jnp.pad(a, [(0, 0)] * 3 + [(0, padding)] + [(0, 0)] * len(rest))
  a = a.reshape(s, b // s, r, config.chunk, num_chunks, *rest)
  return jnp.moveaxis(a, 4, 0)


def _from_chunks(a, num_positions, config):
  """Inverse of `_to_chunks`."""
  s, r = config.shards
  a = jnp.moveaxis(a, 0, 4)
  _, b, _, chunk, num_chunks, *rest = a.shape
  a = a.reshape(s, b, r, chunk * num_chunks, *rest)[
    :, :, :, : num_positions // r
  ]
  return a.reshape(s * b, num_positions, *rest)


def _einsum(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
