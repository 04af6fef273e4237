"""Public entry point of quantized_matmul."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from pallas_kernels.common import varying
from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.quantized_matmul import quantize

_NARROW = ('int8', 'float8_e4m3fn', 'float8_e5m2')
_ACTIVATIONS = (None, 'int8', 'float8_e4m3fn')


def quantized_matmul(
  x: Float[Array, '*B K'],
  weights: Num[Array, 'R N'],
  scales: Float[Array, '*G N'],
  zero_points: Num[Array, 'G N'] | None = None,
  *,
  activations: str | None = None,
  preferred_element_type: DTypeLike | None = None,
  implementation: str | None = None,
) -> Float[Array, '*B N']:
  """Multiplies by a quantised matrix; made for serving, has no derivative.

  With 8 bits the matrix is `weights * scales`; with 4 bits a row k of it is
  `(weights[k] - zero_points[k // group]) * scales[k // group]`. Sums are
  float32, or exact integers where both sides are int8.

  Args:
    x: Activations.
    weights: `[K, N]` int8, float8_e4m3fn or float8_e5m2; or int32 words
      `[K / 8, N]` of eight 4-bit values, see `quantize.pack`.
    scales: `[N]` for 8 bits; `[K / group, N]` for 4 bits, with groups of 32, 64
      or 128.
    zero_points: For 4 bits: the value that stands for 0, from -8 to 7.
    activations: What each token of `x` is rounded to, with a scale of its own
      from its largest value (LLM.int8(), https://arxiv.org/abs/2208.07339,
      section 2.1): 'int8' for int8 weights, 'float8_e4m3fn' for float8 ones;
      `None` leaves `x` as it is.
    preferred_element_type: Dtype of the result; `None` is that of `x`.
    implementation: 'reference', 'xla', 'pallas_tpu' or 'pallas_gpu'; `None` is
      the fastest that accepts these inputs where the program will run.

  Returns:
    The products.

  Raises:
    ValueError: Shapes or dtypes that do not fit together.
  """
  _check(x, weights, scales, zero_points, activations)
  out = dispatch(
    'quantized_matmul',
    *varying.vary_alike(
      x.reshape(-1, x.shape[-1]), weights, scales, zero_points
    ),
    activations=activations,
    preferred_element_type=preferred_element_type,
    implementation=implementation,
  )
  return out.reshape(*x.shape[:-1], out.shape[-1])


def _check(x, weights, scales, zero_points, activations):
  k, n = x.shape[-1], weights.shape[-1]
  packed = weights.dtype == jnp.int32
  if not packed and weights.dtype.name not in _NARROW:
    raise ValueError(
      f'weights of {weights.dtype}, not int32 (packed) or one of {_NARROW}'
    )
  rows = k // quantize.VALUES_PER_WORD if packed else k
  if weights.shape != (rows, n) or packed and k % quantize.PACKED_ROWS:
    raise ValueError(
      f'x {x.shape} does not fit {weights.dtype} weights {weights.shape}'
    )
  if packed:
    shapes = [(k // size, n) for size in quantize.GROUP_SIZES]
  else:
    shapes = [(n,)]
  if scales.shape not in shapes:
    raise ValueError(f'scales {scales.shape}, not one of {shapes}')
  if zero_points is not None and (
    not packed or zero_points.shape != scales.shape
  ):
    raise ValueError(
      f'zero_points {zero_points.shape} for {weights.dtype} weights with '
      f'scales {scales.shape}: packed ones have as many as scales, others none'
    )
  family = 'float8' if weights.dtype.name.startswith('float8') else 'int8'
  if (
    activations not in _ACTIVATIONS
    or activations is not None
    and (packed or not activations.startswith(family))
  ):
    raise ValueError(
      f'{activations=} with {weights.dtype} weights: int8 goes with int8, '
      'float8_e4m3fn with float8, None with all'
    )
