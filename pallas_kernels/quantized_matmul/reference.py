"""Ground truth for quantized_matmul: the matrix itself, in float32."""

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
  rows = x.astype(jnp.float32)
  if activations is not None:
    values, x_scales = quantize.to_grid(rows, activations, axis=1)
    rows = values.astype(jnp.float32) * x_scales
  if weights.dtype == jnp.int32:
    size = x.shape[1] // scales.shape[0]
    matrix = quantize.unpack(weights).astype(jnp.float32)
    if zero_points is not None:
      matrix -= jnp.repeat(zero_points.astype(jnp.float32), size, axis=0)
    matrix *= jnp.repeat(scales.astype(jnp.float32), size, axis=0)
  else:
    matrix = weights.astype(jnp.float32) * scales.astype(jnp.float32)
  out = jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)
  return out.astype(out_dtype)
