"""sampling for XLA, exact, without a sort.

The cut-offs are thresholds on the logits, found bit by bit: 32 counting passes
over the vocabulary give the very float at which the set ends, so nothing is
sorted and a vocabulary sharded over devices stays sharded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LANES = 512


def sampling(logits, temperature, top_k, top_p, min_p, uniform):
  """See `api.sampling`."""
  logits = logits.astype(jnp.float32)
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
  kept = keep(scaled, top_k, top_p, min_p)
  best = scaled.max(axis=-1, keepdims=True)
  token, found = _draw(jnp.where(kept, jnp.exp(scaled - best), 0.0), uniform)
  return jnp.where((temperature > 0) & found, token, greedy)


def _draw(weights_BV, uniform):
  """Token at which the sum over lanes, then along one, passes `uniform`."""
  b, vocab = weights_BV.shape
  lanes = min(_LANES, vocab)
  weights = jnp.pad(weights_BV, ((0, 0), (0, -vocab % lanes)))
  weights = weights.reshape(b, -1, lanes)
  sums = jnp.cumsum(weights.sum(axis=1), axis=-1)
  target = uniform[:, None] * sums[:, -1:]
  passed = sums <= target
  lane = passed.sum(axis=-1)
  rest = target - jnp.where(passed, sums, 0.0).max(axis=-1, keepdims=True)
  at = jnp.minimum(lane, lanes - 1)[:, None, None]
  column = jnp.take_along_axis(weights, at, axis=2)[..., 0]
  step = jnp.sum(jnp.cumsum(column, axis=-1) <= rest, axis=-1)
  # Sums in another order may leave none above.
  found = (lane < lanes) & (step < weights.shape[1])
  return (step * lanes + lane).astype(jnp.int32), found


def keep(
  logits: Float[Array, 'U V'],
  top_k: Int[Array, 'U'],
  top_p: Float[Array, 'U'],
  min_p: Float[Array, 'U'],
) -> Bool[Array, 'U V']:
  """Which tokens survive all three cuts; the most likely one always does."""
  order = _ordered_bits(logits)
  vocab = logits.shape[-1]

  def cut_top_k(kept):
    wanted = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    count = lambda t: jnp.sum(order >= t[:, None], axis=-1)
    threshold = _largest(lambda t: count(t) >= wanted, logits.shape[0])
    return kept & (order >= threshold[:, None])

  def cut_top_p(kept):
    probs = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    mass = lambda t: jnp.sum(
      jnp.where(order >= t[:, None], probs, 0.0), axis=-1
    )
    threshold = _largest(lambda t: mass(t) >= top_p, logits.shape[0])
    cut = order >= threshold[:, None]
    best = order == order.max(axis=-1, keepdims=True)
    return kept & (cut | best | (top_p >= 1.0)[:, None])

  def cut_min_p(kept):
    best = logits.max(axis=-1, keepdims=True)
    floor = best + jnp.log(min_p)[:, None]
    return kept & ((logits >= floor) | (logits == best))

  kept = jnp.ones(logits.shape, bool)
  for any_row, cut in (
    (jnp.any(top_k > 0), cut_top_k),
    (jnp.any(top_p < 1.0), cut_top_p),
    (jnp.any(min_p > 0.0), cut_min_p),
  ):
    kept = jax.lax.cond(any_row, cut, lambda k: k, kept)
  return kept


def _ordered_bits(x):
  """float32 -> uint32 in the same order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(holds, num_rows):
  """The largest uint32 per row for which a monotone predicate holds (or 0)."""

  def add_bit(i, threshold):
    bit = jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32))
    candidate = threshold | bit
    return jnp.where(holds(candidate), candidate, threshold)

  return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((num_rows,), jnp.uint32))
