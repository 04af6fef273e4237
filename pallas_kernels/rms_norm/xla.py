"""rms_norm as XLA fuses it; the root is recomputed in the backward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm.gradient import differentiable


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None = None,
  **kwargs: Any,
) -> Any:
  """See `api.rms_norm`."""
  return differentiable(
    functools.partial(rms_norm_forward, **kwargs),
    functools.partial(rms_norm_backward, **kwargs),
    x,
    scale,
    residual,
  )


def rms_norm_forward(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """The norm, and the sum that it is of."""
  total = x if residual is None else x + residual
  h, inverse = _inverse(total, epsilon)
  return (h * inverse * _gain(scale, plus_one)).astype(x.dtype), total


def rms_norm_backward(
  total: jax.Array,
  scale: jax.Array,
  d_norm: jax.Array,
  d_total: jax.Array | None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of the sum and of scale."""
  h, inverse = _inverse(total, epsilon)
  unit = h * inverse
  d_norm = d_norm.astype(jnp.float32)
  d_unit = d_norm * _gain(scale, plus_one)
  along = jnp.mean(d_unit * unit, axis=-1, keepdims=True)
  d_h = inverse * (d_unit - unit * along)
  if d_total is not None:
    d_h += d_total.astype(jnp.float32)
  d_scale = jnp.sum(d_norm * unit, axis=tuple(range(unit.ndim - 1)))
  return d_h.astype(total.dtype), d_scale.astype(scale.dtype)


def _inverse(total, epsilon):
  h = total.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
  return h, jax.lax.rsqrt(mean_square + epsilon)


def _gain(scale, plus_one):
  return scale.astype(jnp.float32) + (1.0 if plus_one else 0.0)
