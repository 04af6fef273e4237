"""Ground truth: sorts every row."""

import jax
import jax.numpy as jnp
import numpy as np


def sampling(logits, temperature, top_k, top_p, min_p, uniform):
  """See `api.sampling`."""
  vocab = logits.shape[1]
  tokens = np.arange(vocab)
  order = np.lexsort((tokens, tokens % 512))

  def draw(logits, temperature, top_k, top_p, min_p, uniform):
    greedy = jnp.argmax(logits).astype(jnp.int32)
    logits = logits / jnp.where(temperature > 0, temperature, 1)
    sorted_logits = -jnp.sort(-logits)
    k = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    cut = sorted_logits[k - 1]
    probs = jax.nn.softmax(
      jnp.where(sorted_logits >= cut, sorted_logits, -jnp.inf)
    )
    # The first rank at which the sum reaches top_p; rounding may keep it below.
    rank = jnp.minimum(jnp.sum(jnp.cumsum(probs) < top_p), k - 1)
    cut = jnp.where(top_p < 1, jnp.maximum(cut, sorted_logits[rank]), cut)
    weights = jnp.exp(logits - sorted_logits[0])
    kept = (logits >= cut) & (weights >= min_p) | (logits == sorted_logits[0])
    sums = jnp.cumsum(jnp.where(kept, weights, 0)[order])
    # Rounding may leave no sum above; then the likeliest.
    passed = sums > uniform * sums[-1]
    token = jnp.asarray(order, jnp.int32)[jnp.argmax(passed)]
    return jnp.where((temperature > 0) & passed[-1], token, greedy)

  return jax.vmap(draw)(
    logits.astype(jnp.float32), temperature, top_k, top_p, min_p, uniform
  )
