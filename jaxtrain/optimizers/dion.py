"""Dion: orthonormal updates of low rank, made for sharded matrices.

Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan and Langford, "Dion: Distributed
Orthonormalized Updates", 2025, https://arxiv.org/abs/2504.05295. One step of a
power iteration, started from the factor Q of the step before, finds a low-rank
approximation of the momentum; its factors made orthonormal are the update, and
what it misses stays in the momentum. A matrix of ours `[in, out]` is the
transpose of the paper's X.

Embeddings and vectors are updated by Lion with the paper's scales of the
learning rate: 1, and 1 / sqrt(d_in) for the unembedding; for matrices
sqrt(d_out / d_in).

Deviations:

* The factor P is made orthonormal by a Householder QR, as in the algorithm for
  one device, or on CPUs by Gram and Schmidt's method. The distributed
  algorithm's randomised Cholesky QR is not here: XLA gathers P, of rank
  columns, for it. `spread` lets each device take layers of its own.
* Gradients are summed over data-parallel replicas before they come here. The
  paper's compressed synchronisation, which sums P and R instead and lets each
  replica's momentum be its own, is counted (`_traffic.py`) but not done.
* Q of matrices of one shape starts from the same random numbers: the key is a
  hash of the shape, which is the same for a layer alone and in a stack.
* Q is float32 and replicated, as its shape is not the parameter's.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import _matrices
from jaxtrain.optimizers import base
from jaxtrain.sharding.spread import Spread

_DEPENDENT = 1e-6


class DionState(NamedTuple):
  """State of `scale_by_dion`.

  Attributes:
    momentum: Of the parameters' shapes and dtypes.
    q: Right factors, float32 `[..., d_in, rank]`.
  """

  momentum: Any
  q: Any


def dion(
  learning_rate: optax.ScalarOrSchedule,
  rank_fraction: float = 0.25,
  mu: float = 0.95,
  weight_decay: float = 0.01,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  seed: int = 0,
  spread: Spread | None = None,
) -> optax.GradientTransformation:
  r"""Low-rank orthonormal updates for matrices, Lion for what is none.

  .. math:: B_t = M_{t-1} + G_t, \quad P_t = \mathrm{QR}(B_t Q_{t-1}), \quad
    R_t = B_t^\top P_t

  .. math:: M_t = B_t - (1 - \mu) P_t R_t^\top, \quad
    Q_t = \mathrm{ColumnNormalize}(R_t)

  .. math:: X_t = X_{t-1} - \eta_t
    (\sqrt{d_{out} / d_{in}} \, P_t Q_t^\top + \lambda X_{t-1})

  Args:
    learning_rate: Step size or schedule, of Lion too.
    rank_fraction: Rank over the smaller side of a matrix; rounded up.
    mu: Momentum.
    weight_decay: Decoupled weight decay :math:`\lambda`.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. `None` is everything.
    b1: Lion's weight of its momentum in an update.
    b2: Lion's decay of the momentum.
    eps: Added to the norms of R's columns.
    seed: Of the first Q.
    spread: Calls the QR decomposition of `[L, (E,) d_out, rank]` so that
      devices share L; see `jaxtrain.sharding.spread.over_leading`.

  Returns:
    The optax transformation.
  """
  return optax.chain(
    _matrices.split(
      scale_by_dion(rank_fraction, mu, eps, seed, spread),
      optax.chain(optax.scale_by_lion(b1, b2), _scale_unembeddings()),
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def scale_by_dion(
  rank_fraction: float,
  mu: float,
  eps: float = 1e-8,
  seed: int = 0,
  spread: Spread | None = None,
) -> optax.GradientTransformation:
  """What `dion` does with matrices; every leaf must be one."""

  def orthonormal(p):
    # On CPUs LAPACK waits for threads that wait for it: now and then forever.
    return jax.lax.platform_dependent(
      p, cpu=gram_schmidt, default=lambda p: jnp.linalg.qr(p)[0]
    )

  def init(params):
    def first(x):
      d_in, d_out = x.shape[-2:]
      key = _matrices.shaped_key(seed, (d_in, d_out))
      q = jax.random.normal(key, (d_in, rank(rank_fraction, d_in, d_out)))
      # A copy for each: broadcast alone would share a buffer.
      return jnp.zeros((*x.shape[:-2], 1, 1)) + q

    return DionState(
      jax.tree.map(jnp.zeros_like, params),
      _matrices.map_matrices(first, params),
    )

  def one(m, g, q):
    # The paper's B is [d_out, d_in].
    b = (m + g.reshape(m.shape).astype(jnp.float32)).mT
    p = b @ q
    p = spread(orthonormal, p) if spread else orthonormal(p)
    r = b.mT @ p
    m = b - (1 - mu) * p @ r.mT
    norm = jnp.sqrt(jnp.sum(r**2, axis=-2, keepdims=True))
    # Without a gradient and a momentum there is no step, and Q must not vanish.
    is_zero = jnp.all(b == 0, axis=(-2, -1), keepdims=True)
    q = jnp.where(is_zero, q, r / (norm + eps))
    step = jnp.where(is_zero, 0.0, p @ q.mT)
    return math.sqrt(b.shape[-2] / b.shape[-1]) * step.mT, m.mT, q

  def update(updates, state, params=None):
    del params
    found = _matrices.map_matrices(one, state.momentum, updates, state.q)
    new, m, q = _matrices.unzip(found, updates, 3)
    momentum = _matrices.shaped_as(m, state.momentum)
    return _matrices.shaped_as(new, updates), DionState(momentum, q)

  return optax.GradientTransformation(init, update)


def rank(fraction: float, *sides: int) -> int:
  """Rank of a matrix's update: of its smaller side a fraction, at least 1."""
  return max(1, math.ceil(fraction * min(sides)))


def _scale_unembeddings():
  """Multiplies by 1 / sqrt(d_in) what maps to the vocabulary."""

  def one(leaf, u):
    if leaf.kind == 'embedding' and leaf.axes[-1] == 'vocab':
      return u * u.shape[leaf.num_batched] ** -0.5
    return u

  return optax.stateless(
    lambda updates, _: jax.tree.map(one, base.describe(updates), updates)
  )


def gram_schmidt(p: jax.Array) -> jax.Array:
  """Orthonormal columns that span those of `p`, one after the other.

  Each is made orthogonal to those before it twice, which is enough (Giraud,
  Langou and Rozloznik, 2005, https://doi.org/10.1007/s00211-005-0615-4). One
  that depends on them becomes zero.

  Args:
    p: `[..., m, r]`, float32.
  """

  def column(j, q):
    x = jax.lax.dynamic_slice_in_dim(p, j, 1, axis=-1)
    first = jnp.linalg.norm(x, axis=-2, keepdims=True)
    for _ in range(2):
      x -= q @ (q.mT @ x)
    norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
    depends = norm <= _DEPENDENT * first
    x = jnp.where(depends, 0, x / jnp.where(depends, 1, norm))
    return jax.lax.dynamic_update_slice_in_dim(q, x, j, axis=-1)

  return jax.lax.fori_loop(0, p.shape[-1], column, jnp.zeros_like(p))
