"""Singular vectors by Jacobi's rotations, without LAPACK.

Hestenes, "Inversion of Matrices by Biorthogonalization and Related Results",
1958, https://doi.org/10.1137/0106005: pairs of rows are rotated until all are
orthogonal; what rotated them is the left singular vectors. Half of the rows
meet the other half at once, in the order of a round-robin tournament (Brent and
Luk, "The solution of singular-value and symmetric eigenvalue problems on
multiprocessor arrays", 1985, https://doi.org/10.1137/0906007). Both from
memory, not looked up again.

Why: on a CPU of few cores LAPACK, called beside other work of one program,
waits for threads that wait for it, now and then for ever. These are loops of
elementwise operations and products. Why not a power iteration: singular values
of a gradient lie close, and it tells vectors apart by their quotients.
"""

import jax
import jax.numpy as jnp

from jaxtrain.optimizers.dion import gram_schmidt

_TOLERANCE = 1e-6
# Six to ten are usual; the bound is for what is no number.
_MAX_SWEEPS = 30


def left_singular_vectors(g: jax.Array) -> jax.Array:
  """Left singular vectors of `[..., m, n]`, m <= n, by falling singular value.

  Args:
    g: Float32.

  Returns:
    `[..., m, m]`, orthonormal columns, also where `g` has not full rank.
  """
  m = g.shape[-2]
  # The same vectors, of m columns instead of n.
  square = g @ gram_schmidt(g.mT)
  eye = jnp.broadcast_to(jnp.eye(m, dtype=g.dtype), square.shape)
  rows = jnp.concatenate([square, eye], -1)
  if m % 2:
    rows = jnp.concatenate([rows, jnp.zeros_like(rows[..., :1, :])], -2)

  def sweep(state):
    rows, _, i = state
    num = max(rows.shape[-2] - 1, 1)
    most = jnp.zeros((), g.dtype)
    rows, most = jax.lax.fori_loop(0, num, _round, (rows, most))
    return rows, most, i + 1

  def goes_on(state):
    _, most, i = state
    return (most > _TOLERANCE) & (i < _MAX_SWEEPS)

  rows, _, _ = jax.lax.while_loop(
    goes_on, sweep, (rows, jnp.ones((), g.dtype), 0)
  )
  values = jnp.sum(rows[..., :m] ** 2, -1)
  # The row of zeros that made their number even comes last, and has no vector.
  is_pad = jnp.sum(rows[..., m:] ** 2, -1) < 0.5
  order = jnp.argsort(jnp.where(is_pad, jnp.inf, -values), -1)[..., :m]
  return jnp.take_along_axis(rows[..., m:], order[..., None], -2).mT


def _round(i, state):
  """Rotates every row with one other, and changes the partners."""
  del i
  rows, most = state
  m = rows.shape[-1] // 2
  half = rows.shape[-2] // 2
  a, b = rows[..., :half, :], jnp.flip(rows[..., half:, :], -2)
  dot = lambda x, y: jnp.sum(x[..., :m] * y[..., :m], -1, keepdims=True)
  aa, bb, ab = dot(a, a), dot(b, b), dot(a, b)
  scale = jnp.sqrt(aa * bb)
  cosine = jnp.abs(ab) / jnp.where(scale > 0, scale, 1)
  turns = cosine > _TOLERANCE
  zeta = (bb - aa) / (2 * jnp.where(turns, ab, 1))
  sign = jnp.where(zeta < 0, -1.0, 1.0)
  t = jnp.where(turns, sign / (jnp.abs(zeta) + jnp.sqrt(1 + zeta**2)), 0)
  c = 1 / jnp.sqrt(1 + t**2)
  a, b = c * (a - t * b), c * (t * a + b)
  rows = jnp.concatenate([a, jnp.flip(b, -2)], -2)
  first, rest = rows[..., :1, :], rows[..., 1:, :]
  rows = jnp.concatenate([first, jnp.roll(rest, 1, -2)], -2)
  return rows, jnp.maximum(most, jnp.max(jnp.where(turns, cosine, 0)))
