"""Ground truth for grouped_matmul: a loop over groups, in float32."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None = None,
  *,
  preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
  """See `api.grouped_matmul`."""
  if rhs_scales is not None:
    # Quantised matrices are constants.
    rhs = rhs.astype(jnp.float32) * rhs_scales.astype(jnp.float32)[:, None]
    rhs = jax.lax.stop_gradient(rhs)
  row = jnp.arange(lhs.shape[0])
  ends = jnp.cumsum(group_sizes)
  out = jnp.zeros((lhs.shape[0], rhs.shape[2]), jnp.float32)
  for e in range(rhs.shape[0]):
    in_group = (row >= ends[e] - group_sizes[e]) & (row < ends[e])
    product = jnp.matmul(
      lhs.astype(jnp.float32),
      rhs[e].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    out = jnp.where(in_group[:, None], product, out)
  return out.astype(preferred_element_type or lhs.dtype)
