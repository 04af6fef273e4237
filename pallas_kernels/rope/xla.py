"""rope as XLA fuses it."""

import jax
import jax.numpy as jnp

from pallas_kernels.rope.gradient import differentiable


def rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """See `api.rope`."""
  return differentiable(rope_forward, rope_backward, x, sin, cos)


def rope_forward(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """The rotation."""
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)


def rope_backward(
  d_out: jax.Array, sin: jax.Array, cos: jax.Array
) -> jax.Array:
  """The rotation back."""
  return rope_forward(d_out, -sin, cos)
