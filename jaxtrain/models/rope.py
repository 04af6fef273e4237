"""Rotary position embedding and its context extensions.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
https://arxiv.org/abs/2104.09864, equation 34, in the half-split layout of
published weights: dimensions i and i + H/2 form a pair.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Angular frequency of each pair, radians per token, `[head_dim / 2]`."""
  exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  freqs = rope.theta**-exponent
  if rope.scaling == 'none':
    scaled = freqs
  elif rope.scaling == 'linear':
    scaled = freqs / rope.factor
  elif rope.scaling == 'llama3':
    scaled = _llama3(rope, freqs)
  else:
    scaled = _yarn(rope, freqs, head_dim)
  return scaled.astype(np.float32)


def _llama3(rope, freqs):
  """Divides long wavelengths by the factor, keeps short, blends between."""
  wavelength = 2 * np.pi / freqs
  rotations = rope.original_max_len / wavelength
  blend = (rotations - rope.low_freq_factor) / (
    rope.high_freq_factor - rope.low_freq_factor
  )
  keep = np.clip(blend, 0.0, 1.0)
  return keep * freqs + (1 - keep) * freqs / rope.factor


def _yarn(rope, freqs, head_dim):
  """NTK-by-parts: Peng et al., https://arxiv.org/abs/2309.00071, eq. 17-21.

  The ramp runs over dimension indices rounded outwards, as in the authors'
  code, which published checkpoints were tuned with.
  """

  def dim_of(rotations):
    length = rope.original_max_len / (rotations * 2 * math.pi)
    return head_dim * math.log(length) / (2 * math.log(rope.theta))

  low = max(math.floor(dim_of(rope.beta_fast)), 0)
  high = min(math.ceil(dim_of(rope.beta_slow)), head_dim - 1)
  span = max(high - low, 1e-3)
  ramp = np.clip((np.arange(head_dim // 2) - low) / span, 0.0, 1.0)
  return freqs / rope.factor * ramp + freqs * (1 - ramp)


def sin_cos(
  positions: jax.Array, rope: Rope, head_dim: int
) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines `[..., head_dim / 2]`, float32, for integer positions."""
  freqs = jnp.asarray(inverse_frequencies(rope, head_dim))
  angles = positions[..., None].astype(jnp.float32) * freqs
  return (
    jnp.sin(angles) * rope.multiplier,
    jnp.cos(angles) * rope.multiplier,
  )


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates `x [B, T, N, H]` by `sin, cos [B, T, H/2]`; keeps the dtype."""
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
