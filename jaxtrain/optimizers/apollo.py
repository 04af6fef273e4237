"""APOLLO: AdamW's step sizes of whole channels, estimated at low rank.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025,
https://arxiv.org/abs/2412.05270, algorithm 1. A gradient is projected onto
`rank` random directions of its smaller side; how much AdamW would scale each
column of what remains, the column of the gradient itself is scaled. Only
AdamW's moments of the projection are kept. The projection is regenerated from
its seed, and changed every `update_proj_gap` steps; the moments stay.

Deviations:

* Matrices of one shape share a projection: its seed is a hash of the shape,
  which is the same for a layer alone and for the same layer in a stack.
* The moments' bias is corrected inside the estimate, as in Adam; the authors'
  program does so after the limiter, in the learning rate.
* Where the previous step was zero, the norm of the next is not limited (a limit
  of 1.01 times zero would never be left). A channel without a projection is not
  scaled but left out.
* The moments are replicated: their shape is not the parameter's.

Embeddings and vectors are AdamW's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import _matrices
from jaxtrain.optimizers import base


class ApolloState(NamedTuple):
  """State of `scale_by_apollo`.

  Attributes:
    count: Updates made, int32.
    mu: First moments of the projections, float32 `[..., rank, channels]`.
    nu: Second moments, the same.
    norm: Norms of the last scaled gradients, float32 `[..., 1, 1]`.
  """

  count: jax.Array
  mu: Any
  nu: Any
  norm: Any


def apollo(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 256,
  scale: float = 1.0,
  update_proj_gap: int = 200,
  gamma: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
  seed: int = 0,
) -> optax.GradientTransformation:
  r"""Gradients whose channels are scaled as AdamW would, at low rank.

  With :math:`R_t = P G_t` and AdamW's direction :math:`\tilde R_t` for it:

  .. math:: W_{t+1} = W_t - \eta_t (\alpha \, G_t \, \mathrm{diag}(s)
    + \lambda W_t), \quad
    s_j = \|\tilde R_t[:, j]\| / \|R_t[:, j]\|

  Args:
    learning_rate: Step size or schedule.
    rank: Rows of :math:`P`; at most the smaller side of a matrix.
    scale: :math:`\alpha`.
    update_proj_gap: Steps between changes of :math:`P`.
    gamma: By what the norm of a scaled gradient may grow in a step.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the denominator, outside the square root.
    weight_decay: Decoupled weight decay :math:`\lambda`.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. `None` is everything.
    seed: Of the projections.

  Returns:
    The optax transformation.
  """
  return _matrices.beside_adamw(
    scale_by_apollo(
      _per_channel, rank, scale, update_proj_gap, gamma, b1, b2, eps, seed
    ),
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
  )


def scale_by_apollo(
  factor: Callable[[jax.Array, jax.Array], jax.Array],
  rank: int,
  scale: float,
  update_proj_gap: int,
  gamma: float,
  b1: float,
  b2: float,
  eps: float,
  seed: int,
) -> optax.GradientTransformation:
  """What `apollo` does with matrices; every leaf must be one.

  Args:
    factor: Of AdamW's direction and the projected gradient, `[..., rank, n]`:
      the scale of the gradient, `[..., 1, n]` or `[..., 1, 1]`.
    rank: As for `apollo`, like all that follow.
    scale: As above.
    update_proj_gap: As above.
    gamma: As above.
    b1: As above.
    b2: As above.
    eps: As above.
    seed: As above.
  """

  def init(params):
    def one(x):
      x = _wide(x)
      shape = (*x.shape[:-2], min(rank, x.shape[-2]), x.shape[-1])
      norms = (*x.shape[:-2], 1, 1)
      return jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(norms)

    found = _matrices.map_matrices(one, params)
    mu, nu, norm = _matrices.unzip(found, params, 3)
    return ApolloState(jnp.zeros((), jnp.int32), mu, nu, norm)

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)

    def one(g, mu, nu, norm):
      is_tall = g.shape[-2] > g.shape[-1]
      g = _wide(g)
      r = (
        projection(
          seed, state.count // update_proj_gap, g.shape[-2:], mu.shape[-2]
        )
        @ g
      )
      mu = b1 * mu + (1 - b1) * r
      nu = b2 * nu + (1 - b2) * r**2
      hat = lambda moment, b: moment / (1 - b**count)
      direction = hat(mu, b1) / (jnp.sqrt(hat(nu, b2)) + eps)
      g = factor(direction, r) * g
      g, norm = _limit(g, norm, gamma)
      return scale * (g.mT if is_tall else g), mu, nu, norm

    found = _matrices.map_matrices(one, updates, state.mu, state.nu, state.norm)
    new, mu, nu, norm = _matrices.unzip(found, updates, 4)
    new = _matrices.shaped_as(new, updates)
    return new, ApolloState(count, mu, nu, norm)

  return optax.GradientTransformation(init, update)


def projection(
  seed: int, epoch: jax.Array, shape: tuple[int, int], rank: int
) -> jax.Array:
  """Normal `[rank, m]` of variance 1 / rank for matrices `[m, n]`."""
  key = jax.random.fold_in(_matrices.shaped_key(seed, shape), epoch)
  return jax.random.normal(key, (rank, shape[0])) * rank**-0.5


def norm_ratio(x: jax.Array, y: jax.Array, axis: Any) -> jax.Array:
  """Norm of `x` over that of `y`, dimensions kept; 0 where `y` is 0."""
  square = lambda a: jnp.sum(a**2, axis=axis, keepdims=True)
  x, y = square(x), square(y)
  return jnp.where(y > 0, jnp.sqrt(x / jnp.where(y > 0, y, 1.0)), 0.0)


def _per_channel(direction, r):
  return norm_ratio(direction, r, -2)


def _wide(x):
  """The matrix or its transpose: not fewer columns than rows."""
  return x.mT if x.shape[-2] > x.shape[-1] else x


def _limit(g, last, gamma):
  """Gradient of at most gamma times the last norm, and its own."""
  norm = jnp.sqrt(jnp.sum(g**2, axis=(-2, -1), keepdims=True))
  most = jnp.where(last > 0, jnp.minimum(norm, gamma * last), norm)
  return g * (most / jnp.where(norm > 0, norm, 1.0)), most
