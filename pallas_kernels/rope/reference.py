"""Ground truth for rope: pairs as complex numbers."""

import jax
import jax.numpy as jnp


def rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """See `api.rope`."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (a + 1j * b) * (cos + 1j * sin)[:, :, None]
  return jnp.concatenate([turned.real, turned.imag], -1).astype(x.dtype)
