"""The derivative of rope, which is the rotation back."""

from collections.abc import Callable

import jax

from pallas_kernels.common import varying
from pallas_kernels.common.gradient import with_gradient


def differentiable(
  forward: Callable[..., jax.Array],
  backward: Callable[..., jax.Array],
  x: jax.Array,
  sin: jax.Array,
  cos: jax.Array,
) -> jax.Array:
  """Calls `forward(x, sin, cos)`, differentiated in x by `backward`.

  Args:
    forward: The rotation.
    backward: `(d_out, sin, cos)` to the gradient of x.
    x: As in `api.rope`, and so are the others.
    sin: Sines.
    cos: Cosines.
  """

  def run(x, sin, cos):
    return forward(x, sin, cos), (sin, cos)

  def gradient(tables, d_out):
    return backward(d_out, *tables), None, None

  x, sin, cos = varying.vary_alike(x, *map(jax.lax.stop_gradient, (sin, cos)))
  return with_gradient(run, gradient, x, sin, cos)
