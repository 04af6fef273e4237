"""The derivative of flash_attention, whichever backends compute it."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.common import varying
from pallas_kernels.common.gradient import with_gradient


def differentiable(
  forward: Callable[..., tuple[jax.Array, jax.Array]],
  backward: Callable[..., tuple[Any, ...]],
  *args: Any,
) -> tuple[jax.Array, jax.Array]:
  """Calls `forward(*args)`, differentiated by `backward`.

  Args:
    forward: Returns the output and the log-sum-exp.
    backward: Of the arguments, what `forward` has returned, and the cotangents
      of these; returns the gradients of q, k, v and the sinks.
    *args: q, k, v, segments, window, sinks, and positions of queries and keys.

  Returns:
    The output and the log-sum-exp.
  """

  def run(*args):
    out, lse = forward(*args)
    return (out, lse), (*args, out, lse)

  def gradient(residuals, cotangents):
    dq, dk, dv, d_sinks = backward(*residuals, *cotangents)
    return dq, dk, dv, None, None, d_sinks, None, None

  return with_gradient(run, gradient, *varying.vary_alike(*args))
