"""Online softmax of ragged paged attention on a TPU: what all its rows share.

Milakov and Gimelshein, "Online normalizer calculation for softmax",
https://arxiv.org/abs/1805.02867, algorithm 3, in powers of two: the factor is
folded into the queries.
"""

import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.ragged_paged_attention import pallas_tpu_stream as stream
from pallas_kernels.ragged_paged_attention.pallas_tpu_plan import Plan

LANES = 128
MASKED = -1e30
_LOG2E = math.log2(math.e)
_TINY = 1e-30


def clear_stale(refs: Any, plan: Plan, i: jax.Array, item: stream.Item) -> None:
  """Zeroes values that no query sees: 0 times what is there may be NaN.

  Words of 32 bits hold 32 / bits tokens of a page, the first one lowest.
  """
  buffer = lax.rem(i, plan.buffers)
  keys = item.position + item.count - item.chunk * plan.chunk

  @pl.when(keys < plan.chunk)
  def _():
    page = lax.div(keys, jnp.int32(plan.page_size))
    words = pltpu.bitcast(refs.v[buffer, page], jnp.uint32)
    packing = plan.page_size // words.shape[1]
    first = lax.broadcasted_iota(jnp.int32, words.shape, 1) * packing
    left = keys - page * plan.page_size - first
    bits = jnp.clip(left, 0, packing - 1) * (32 // packing)
    mask = jnp.where(left >= packing, -1, (1 << bits) - 1)
    words &= pltpu.bitcast(mask, jnp.uint32)
    refs.v[buffer, page] = pltpu.bitcast(words, refs.v.dtype)
    _clear_pages(refs, buffer, page + 1, plan.pages)

  if plan.has_window:
    first, _ = stream.needed_pages(refs, plan, item)
    _clear_pages(refs, buffer, 0, first)


def _clear_pages(refs, buffer, first, end):
  zeros = jnp.zeros(refs.v.shape[2:], refs.v.dtype)

  def clear(p, _):
    refs.v[buffer, p] = zeros
    return 0

  lax.fori_loop(first, end, clear, 0)


def flatten_scales(
  refs: Any, plan: Plan, i: jax.Array, item: stream.Item
) -> None:
  """Scales as [K, keys of the chunk]; those of keys that are not here are 0."""
  buffer = lax.rem(i, plan.buffers)
  keys = item.position + item.count - item.chunk * plan.chunk
  first_page, _ = stream.needed_pages(refs, plan, item)
  first = first_page * plan.page_size
  width = max(plan.page_size, LANES)
  pages = width // plan.page_size
  slots = lax.broadcasted_iota(jnp.int32, (plan.num_kv, width), 1)

  def flatten(j, _):
    start = pl.multiple_of(j * width, width)
    for source, target in (
      (refs.k_scale, refs.k_factor),
      (refs.v_scale, refs.v_factor),
    ):
      x = [source[buffer, j * pages + p] for p in range(pages)]
      x = jnp.concatenate(x, axis=1)
      here = (slots + start >= first) & (slots + start < keys)
      x = jnp.where(here, x, 0)
      target[:, pl.ds(start, width)] = x
    return 0

  lax.fori_loop(0, plan.chunk // width, flatten, 0)


def dot(
  a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: DTypeLike
) -> jax.Array:
  """Product over one dimension of each, float32 in full precision."""
  return lax.dot_general(
    a,
    b,
    ((contract[:1], contract[1:]), ((), ())),
    precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def factor(plan: Plan) -> float:
  """On the queries, so that no product of logits is left to do."""
  return (
    plan.scale * _LOG2E
    if plan.soft_cap is None
    else (plan.scale / plan.soft_cap)
  )


def capped(plan: Plan, s: jax.Array) -> jax.Array:
  """Logits in powers of two, from products with `factor` in them."""
  if plan.soft_cap is None:
    return s
  return plan.soft_cap * _LOG2E * jnp.tanh(s)


def keys_of(
  ref: Any,
  buffer: jax.Array,
  first_page: jax.Array | int,
  num_pages: int,
  k: jax.Array | int,
  dtype: DTypeLike,
) -> jax.Array:
  """Keys or values of one head, [keys, H]."""
  x = ref[buffer, pl.ds(first_page, num_pages), k]
  return x.reshape(-1, x.shape[-1]).astype(dtype)


def tiled(x: jax.Array, width: int) -> jax.Array:
  """Lane-replicated [rows, 128] as [rows, width]."""
  if width <= LANES:
    return x[:, :width]
  return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _partial_sums(p):
  """Sums of every 128th lane; what is left is done once, at the end."""
  total = p[:, :LANES]
  for start in range(LANES, p.shape[1], LANES):
    total += p[:, start : start + LANES]
  return total


def update(
  m_ref: Any, l_ref: Any, at: Any, s: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One step of the online softmax: weights, and the factor on the past."""
  m_old = m_ref[at]
  m_new = jnp.maximum(m_old, jnp.max(s, axis=1, keepdims=True))
  fade = jnp.exp2(m_old - m_new)
  p = jnp.exp2(s - tiled(m_new, s.shape[1]))
  m_ref[at] = m_new
  l_ref[at] = fade * l_ref[at] + _partial_sums(p)
  return p, fade


def start_state(
  plan: Plan, refs: Any, heads: slice, rows: int
) -> tuple[jax.Array, jax.Array]:
  """Running max and partial sums before any key: the sinks', if any."""
  if not plan.has_sinks:
    full = jnp.full((rows, LANES), MASKED, jnp.float32)
    return full, jnp.zeros((rows, LANES), jnp.float32)
  lanes = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
  m = jnp.broadcast_to(refs.sinks[heads], (rows, LANES))
  return m, jnp.where(lanes == 0, 1.0, 0.0)


def result(m: jax.Array, l: jax.Array) -> tuple[jax.Array, jax.Array]:
  """1 / l, and the natural log-sum-exp, both lane-replicated."""
  l = jnp.maximum(jnp.sum(l, axis=1, keepdims=True), _TINY)
  l = jnp.broadcast_to(l, m.shape)
  return 1 / l, (m + jnp.log2(l)) / _LOG2E
