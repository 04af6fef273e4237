"""Ground truth for rms_norm: the formula, in float32."""

from typing import Any

import jax
import jax.numpy as jnp


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None = None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
) -> Any:
  """See `api.rms_norm`."""
  total = x if residual is None else x + residual
  h = total.astype(jnp.float32)
  gain = scale.astype(jnp.float32) + (1.0 if plus_one else 0.0)
  mean_square = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
  norm = (h / jnp.sqrt(mean_square + epsilon) * gain).astype(x.dtype)
  return norm if residual is None else (norm, total)
