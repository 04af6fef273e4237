"""Softmax over keys that are seen in parts.

Milakov & Gimelshein, "Online normalizer calculation for softmax",
https://arxiv.org/abs/1805.02867, theorem 1: partial results combine in any
order.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
  out_a: Float[Array, '*rows H'],
  lse_a: Float[Array, '*rows'],
  out_b: Float[Array, '*rows H'],
  lse_b: Float[Array, '*rows'],
) -> tuple[Float[Array, '*rows H'], Float[Array, '*rows']]:
  """Attention to two disjoint sets of keys, from the attention to each.

  Args:
    out_a: Attention output of the first set.
    lse_a: Natural log-sum-exp of its logits; minus infinity: no key.
    out_b: The same of the second set.
    lse_b: The same.

  Returns:
    Output, in the dtype of `out_a`, and float32 log-sum-exp of the union.
  """
  lse_a, lse_b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
  lse = jnp.logaddexp(lse_a, lse_b)
  # Without a key in either, both weights are zero.
  finite = jnp.where(lse == -jnp.inf, 0.0, lse)

  def weighted(out, part):
    return jnp.exp(part - finite)[..., None] * out.astype(jnp.float32)

  out = weighted(out_a, lse_a) + weighted(out_b, lse_b)
  return out.astype(out_a.dtype), lse
