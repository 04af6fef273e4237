"""Public entry point of rms_norm."""

import functools

from jaxtyping import Array, Float

from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.rms_norm.gradient import differentiable


def rms_norm(
  x: Float[Array, '*B D'],
  scale: Float[Array, 'D'],
  residual: Float[Array, '*B D'] | None = None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
  implementation: str | None = None,
) -> Float[Array, '*B D'] | tuple[Float[Array, '*B D'], Float[Array, '*B D']]:
  """Norm of `x`, or of `x + residual`, computed in float32.

  `h / sqrt(mean(h**2) + epsilon) * scale` along D, where h is x or the sum,
  rounded to the dtype of x as a layer would pass it on.

  Args:
    x: What a layer has computed.
    scale: Gain.
    residual: What to add first, of the dtype of `x`; `None` is nothing.
    epsilon: Added to the mean square.
    plus_one: Whether the gain is `1 + scale` (Gemma).
    implementation: 'reference', 'xla', 'pallas_tpu' or 'pallas_gpu'; `None` is
      the fastest that accepts these inputs where the program will run.

  Returns:
    The norm in the dtype of `x`, and with a residual also the sum.

  Raises:
    ValueError: Shapes or dtypes that do not fit.
  """
  if scale.shape != x.shape[-1:]:
    raise ValueError(f'scale {scale.shape} must be [D] of x {x.shape}')
  if residual is not None and (residual.shape, residual.dtype) != (
    x.shape,
    x.dtype,
  ):
    raise ValueError(
      f'residual {residual.dtype}{residual.shape} must be like x '
      f'{x.dtype}{x.shape}'
    )
  static = dict(epsilon=epsilon, plus_one=plus_one)
  if implementation is not None:
    return dispatch(
      'rms_norm', x, scale, residual, implementation=implementation, **static
    )
  function = lambda f: functools.partial(
    dispatch, 'rms_norm', function=f, **static
  )
  return differentiable(
    function('rms_norm_forward'),
    function('rms_norm_backward'),
    x,
    scale,
    residual,
  )
