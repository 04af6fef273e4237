"""Ground truth for linear_cross_entropy: all logits at once, in float32."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
  x: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  z_loss: float = 0.0,
  logit_soft_cap: float | None = None,
  chunk: int | None = None,
  shards: tuple[int, int] = (1, 1),
  vocab_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """See `api.linear_cross_entropy`."""
  del chunk, shards
  if vocab_axes:
    raise NotImplementedError('the reference has the whole vocabulary')
  # Rounded to the dtype of x, but the gradient is not.
  rounding = head.astype(x.dtype).astype(head.dtype) - head
  head = head + jax.lax.stop_gradient(rounding)
  logits = jnp.matmul(
    x.astype(jnp.float32),
    head.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  if logit_soft_cap is not None:
    logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
  normaliser = jax.nn.logsumexp(logits, axis=-1)
  target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  weights = weights.astype(jnp.float32)
  nll = jnp.sum(weights * (normaliser - target))
  z = z_loss * jnp.sum(weights * normaliser**2)
  sums = dict(
    weight=jnp.sum(weights),
    nll=nll,
    z_loss=z,
    correct=jnp.sum(weights * (target >= logits.max(axis=-1))),
  )
  return nll + z, jax.lax.stop_gradient(sums)
