"""The derivative of rms_norm, whichever backends compute it."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.common import varying
from pallas_kernels.common.gradient import with_gradient


def differentiable(
  forward: Callable[..., tuple[jax.Array, jax.Array]],
  backward: Callable[..., tuple[jax.Array, jax.Array]],
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None,
) -> Any:
  """Calls `forward`, differentiated by `backward`.

  Args:
    forward: `(x, scale, residual)` to the norm and the sum that it is of.
    backward: `(sum, scale, d_norm, d_sum)` to the gradients of the sum, which
      is that of both its terms, and of scale; `d_sum` may be `None`.
    x: As in `api.rms_norm`, and so are the others.
    scale: Gain.
    residual: What is added to x, or `None`.

  Returns:
    The norm, and with a residual the sum.
  """

  def run(x, scale, residual):
    norm, total = forward(x, scale, residual)
    return norm if residual is None else (norm, total), (total, scale)

  def gradient(saved, cotangents):
    total, scale = saved
    if residual is None:
      cotangents = cotangents, None
    d_total, d_scale = backward(total, scale, *cotangents)
    return d_total, d_scale, None if residual is None else d_total

  return with_gradient(run, gradient, *varying.vary_alike(x, scale, residual))
