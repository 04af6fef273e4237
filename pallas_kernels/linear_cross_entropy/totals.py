"""What the kernels of linear_cross_entropy share: from statistics to the loss.

Statistics of a token are its largest logit, the sum of exponentials relative to
that, and its target's logit (0 where a shard does not hold the target).
"""

import jax
import jax.numpy as jnp


def check(shards: tuple[int, int]) -> None:
  """Raises `NotImplementedError` for arrays that are not one shard."""
  if tuple(shards) != (1, 1):
    raise NotImplementedError(
      f'a kernel runs on one shard, inside shard_map; {shards=}'
    )


def local(
  targets: jax.Array, head: jax.Array, vocab_axes: tuple[str, ...]
) -> jax.Array:
  """Columns of this shard, far below 0 for those of others."""
  if not vocab_axes:
    return targets
  size = head.shape[1]
  targets = targets - jax.lax.axis_index(vocab_axes) * size
  here = (targets >= 0) & (targets < size)
  return jnp.where(here, targets, jnp.iinfo(jnp.int32).min // 2)


def combine(
  stats: tuple[jax.Array, ...], vocab_axes: tuple[str, ...]
) -> tuple[jax.Array, ...]:
  """Log-normaliser, target's and largest logit of each token, `[C]`."""
  largest, exp_sum, target = stats
  if vocab_axes:
    own = largest
    largest = jax.lax.pmax(largest, vocab_axes)
    exp_sum = jax.lax.psum(exp_sum * jnp.exp(own - largest), vocab_axes)
    target = jax.lax.psum(target, vocab_axes)
  return largest + jnp.log(exp_sum), target, largest


def totals(
  combined: tuple[jax.Array, ...], weights: jax.Array, z_loss: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss and the sums, from what `combine` returns."""
  normaliser, target, largest = combined
  nll = jnp.sum(weights * (normaliser - target))
  z = z_loss * jnp.sum(weights * normaliser**2)
  correct = jnp.sum(weights * (target >= largest))
  sums = dict(weight=jnp.sum(weights), nll=nll, z_loss=z, correct=correct)
  return nll + z, sums


def d_weights(combined: tuple[jax.Array, ...], z_loss: float) -> jax.Array:
  """Gradient of the weights: each token's loss."""
  normaliser, target, _ = combined
  return normaliser - target + z_loss * normaliser**2
