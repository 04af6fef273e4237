"""Public entry point of rope."""

import functools

import jax
from jaxtyping import Array, Float

from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.rope.gradient import differentiable


def rope(
  x: Float[Array, 'B T N H'],
  sin: Float[Array, 'C T h'],
  cos: Float[Array, 'C T h'],
  *,
  implementation: str | None = None,
) -> Float[Array, 'B T N H']:
  """Rotates the pairs of dimensions i and i + H/2 by the angle of a position.

  Args:
    x: Queries or keys.
    sin: Sines of the angles, h = H/2; C is B or 1. Not differentiated.
    cos: Cosines.
    implementation: 'reference', 'xla' or 'pallas_tpu'; `None` is the fastest
      that accepts these inputs where the program will run.

  Returns:
    The rotated heads in the dtype of `x`, computed in float32.

  Raises:
    ValueError: Shapes that do not fit.
  """
  b, t, _, h = x.shape
  if sin.shape != cos.shape or sin.shape not in [
    (b, t, h // 2),
    (1, t, h // 2),
  ]:
    raise ValueError(
      f'sin {sin.shape} and cos {cos.shape} must be [B or 1, T, H/2] of x '
      f'{x.shape}'
    )
  if implementation is not None:
    sin, cos = map(jax.lax.stop_gradient, (sin, cos))
    return dispatch('rope', x, sin, cos, implementation=implementation)
  function = lambda f: functools.partial(dispatch, 'rope', function=f)
  return differentiable(
    function('rope_forward'), function('rope_backward'), x, sin, cos
  )
