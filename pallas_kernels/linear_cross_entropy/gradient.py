"""The derivative of linear_cross_entropy, whichever backend computes it.

The loss is a sum over tokens and the last thing a model computes: its gradient
does not depend on what follows, but for a factor. So the forward pass of a
differentiated call computes it while it has the softmax (Hsu et al., "Liger
Kernel", https://arxiv.org/abs/2410.10989, section 3.2): three products with the
head, where recomputing the logits would take four.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import varying


def with_gradients(
  value: Callable[..., Any],
  gradients: Callable[..., tuple[Any, tuple[jax.Array, ...]]],
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  vocab_axes: tuple[str, ...],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Calls `value`, or `gradients` where the call is differentiated.

  Args:
    value: Function of the four arrays that returns the loss and the sums.
    gradients: The same and the gradients of x, head and weights.
    x: As in `api.linear_cross_entropy`, and so are the others.
    head: Output projection.
    targets: Token ids.
    weights: Factors.
    vocab_axes: Mesh axes that the columns of `head` are split over.

  Returns:
    The loss and the sums.
  """

  @jax.custom_vjp
  def run(*arrays):
    return value(*arrays)

  def backward(gradients, cotangents):
    scale, _ = cotangents
    d_x, d_head, d_weights = (
      (scale * g.astype(jnp.float32)).astype(g.dtype) for g in gradients
    )
    return d_x, d_head, None, d_weights

  run.defvjp(gradients, backward)
  x, head, varied = varying.vary_alike(x, head, weights)
  # Shards of the vocabulary have the same tokens.
  targets, weights = (
    varying.vary_as(a, varied, but=vocab_axes) for a in (targets, weights)
  )
  loss, sums = run(x, head, targets, weights)
  return loss, jax.lax.stop_gradient(sums)
