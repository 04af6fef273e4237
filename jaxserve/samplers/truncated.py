"""Temperature, top-k, top-p and min-p sampling, exact, without a sort.

The cut-offs are thresholds on the logits, found bit by bit: 32 counting passes
over the vocabulary give the very float at which the set ends, so nothing is
sorted and a vocabulary sharded over devices stays sharded. The token is the
argmax of the kept logits plus Gumbel noise.

* top-k: Fan et al., https://arxiv.org/abs/1805.04833, section 5.
* top-p: Holtzman et al., https://arxiv.org/abs/1904.09751, equation 2.
* min-p: Nguyen et al., https://arxiv.org/abs/2407.01082, section 3.
* Gumbel-max: Maddison et al., https://arxiv.org/abs/1411.0030, section 2.

The cuts apply in this order, each to what the last one kept, after the
temperature. Tokens that tie at a threshold are all kept.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.samplers import base


def truncated() -> base.Sampler:
  """The sampler; rows of temperature 0 take the argmax."""

  def sample(logits, rows):
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(
      jnp.any(rows.temperature > 0),
      lambda: jnp.where(rows.temperature > 0, _draw(logits, rows), greedy),
      lambda: greedy,
    )

  return sample


def _draw(logits, rows):
  temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
  scaled = logits / temperature[:, None]
  kept = keep(scaled, rows.top_k, rows.top_p, rows.min_p)
  noise = jax.vmap(_gumbel, (0, 0, None))(
    rows.seed, rows.position, logits.shape[-1]
  )
  noisy = jnp.where(kept, scaled + noise, -jnp.inf)
  return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def _gumbel(seed, position, size):
  key = jax.random.fold_in(jax.random.key(seed.astype(jnp.uint32)), position)
  return jax.random.gumbel(key, (size,), jnp.float32)


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
    return kept & (cut | (top_p >= 1.0)[:, None])

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
