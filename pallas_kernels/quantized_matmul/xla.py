"""quantized_matmul in plain XLA, which fuses the widening into the product.

Eight-bit matrices multiply as they are and scale the result; four-bit ones are
widened with their scales first, to the dtype of `x`.

Cost: 2 M K N FLOPs; HBM: weights, x and the result, and where XLA does not fuse
it the widened matrix, written and read.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.quantized_matmul import quantize


def quantized_matmul(
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  zero_points: jax.Array | None = None,
  *,
  activations: str | None = None,
  preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
  """See `api.quantized_matmul`; `x` is `[M, K]`."""
  out_dtype = preferred_element_type or x.dtype
  factor = scales.astype(jnp.float32)
  if weights.dtype == jnp.int32:
    matrix = _dequantized(weights, scales, zero_points).astype(x.dtype)
    return _dot(x, matrix, jnp.float32).astype(out_dtype)
  if activations is None:
    out = _dot(x, weights.astype(x.dtype), jnp.float32)
  else:
    x, x_scales = quantize.to_grid(x.astype(jnp.float32), activations, axis=1)
    factor = factor * x_scales
    if activations == 'int8':
      out = _dot(x, weights, jnp.int32).astype(jnp.float32)
    else:
      # Both are exact in bfloat16, and so are their products in float32.
      x, weights = (a.astype(jnp.bfloat16) for a in (x, weights))
      out = _dot(x, weights, jnp.float32)
  return (out * factor).astype(out_dtype)


def _dequantized(words, scales, zero_points):
  matrix = quantize.unpack(words).astype(jnp.float32)
  groups = matrix.reshape(scales.shape[0], -1, scales.shape[1])
  if zero_points is not None:
    groups -= zero_points.astype(jnp.float32)[:, None]
  groups *= scales.astype(jnp.float32)[:, None]
  return groups.reshape(matrix.shape)


def _dot(a, b, dtype):
  return jax.lax.dot_general(
    a, b, (((1,), (0,)), ((), ())), preferred_element_type=dtype
  )
