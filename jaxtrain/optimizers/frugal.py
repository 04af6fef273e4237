"""FRUGAL: AdamW in a subspace that changes, signSGD in the rest.

Zmushko, Beznosikov, Takac and Horvath, "FRUGAL: Memory-Efficient Optimization
by Reducing State Overhead for Scalable Training", ICML 2025,
https://arxiv.org/abs/2411.07837, algorithm 1. A gradient is split in two: the
part in a subspace of `density` is AdamW's, the rest is followed by its sign and
leaves no state. Every `update_gap` steps the subspace is drawn anew and the
moments start from zero.

Two of the paper's subspaces are here: random columns (`project='columns'`) and
the first singular vectors of the gradient (`project='svd'`), those of GaLore.
Blocks of whole layers are not: which layer's turn it is would depend on the
others, and layers of a stack would not be updated as alone.

Deviations:

* Random columns are found again from a seed, not stored. The seed is a hash of
  the matrix's shape, which is the same for a layer alone and in a stack; so
  matrices of one shape have the same columns at the same time.
* The moments are replicated: their shape is not the parameter's.
* That signSGD's step is AdamW's (`free_scale` of 1) in pre-training is from
  memory of the paper, not looked up again.
* On CPUs singular vectors are found by Jacobi's rotations (`_jacobi.py`), as
  LAPACK may wait for ever beside other work of the same program; elsewhere by
  `jnp.linalg.svd`.

Embeddings and vectors are AdamW's, always.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import _jacobi
from jaxtrain.optimizers import _matrices
from jaxtrain.optimizers import base


class FrugalState(NamedTuple):
  """State of `scale_by_frugal`.

  Attributes:
    count: Updates made, int32.
    mu: First moments of the gradients in the subspace, float32.
    nu: Second moments, the same.
    basis: Of 'svd': singular vectors, float32 `[..., m, k]`, m the smaller side
      of a matrix; else of no elements.
  """

  count: jax.Array
  mu: Any
  nu: Any
  basis: Any


class Subspace(NamedTuple):
  """How gradients are split.

  Attributes:
    init: Of `[..., R, C]`: the basis that is kept, and the shape of a gradient
      in the subspace.
    renew: Of gradient, basis and the number of the subspace: the next basis.
    down: Of gradient, basis and number: the gradient in the subspace.
    up: Of that, the gradient's shape, basis and number: it in the whole space.
  """

  init: Callable[..., Any]
  renew: Callable[..., Any]
  down: Callable[..., Any]
  up: Callable[..., Any]


def frugal(
  learning_rate: optax.ScalarOrSchedule,
  density: float = 0.25,
  update_gap: int = 200,
  project: str = 'columns',
  free_scale: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
  seed: int = 0,
) -> optax.GradientTransformation:
  """AdamW in a part of every matrix, signSGD in the rest of it.

  Args:
    learning_rate: Step size or schedule.
    density: Part of the dimensions that has a state; rounded up.
    update_gap: Steps between changes of the subspace.
    project: 'columns' or 'svd'.
    free_scale: Step size of signSGD over `learning_rate`.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the denominator, outside the square root.
    weight_decay: Decoupled weight decay, of both parts.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. `None` is everything.
    seed: Of the columns.

  Returns:
    The optax transformation.

  Raises:
    ValueError: `density` is not in (0, 1], or an unknown `project`.
  """
  if not 0 < density <= 1:
    raise ValueError(f'density {density} is not in (0, 1]')
  known = {'columns': columns, 'svd': svd}
  if project not in known:
    raise ValueError(f'project {project!r} is not one of {", ".join(known)}')
  subspace = known[project](density, seed)
  return _matrices.beside_adamw(
    scale_by_frugal(subspace, update_gap, free_scale, b1, b2, eps),
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
  )


def scale_by_frugal(
  subspace: Subspace,
  update_gap: int = 200,
  free_scale: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """What `frugal` does with matrices; every leaf must be one."""

  def init(params):
    def one(x):
      basis, shape = subspace.init(x)
      return jnp.zeros(shape), jnp.zeros(shape), basis

    found = _matrices.map_matrices(one, params)
    mu, nu, basis = _matrices.unzip(found, params, 3)
    return FrugalState(jnp.zeros((), jnp.int32), mu, nu, basis)

  def update(updates, state, params=None):
    del params
    number, age = jnp.divmod(state.count, update_gap)
    is_new = age == 0

    def one(g, mu, nu, basis):
      basis = jax.lax.cond(
        is_new, subspace.renew, lambda g, basis, number: basis, g, basis, number
      )
      full = subspace.down(g, basis, number)
      free = g - subspace.up(full, g, basis, number)
      old = lambda moment: jnp.where(is_new, 0.0, moment)
      mu = b1 * old(mu) + (1 - b1) * full
      nu = b2 * old(nu) + (1 - b2) * full**2
      hat = lambda moment, b: moment / (1 - b ** (age + 1))
      step = hat(mu, b1) / (jnp.sqrt(hat(nu, b2)) + eps)
      step = subspace.up(step, g, basis, number)
      return step + free_scale * jnp.sign(free), mu, nu, basis

    found = _matrices.map_matrices(
      one, updates, state.mu, state.nu, state.basis
    )
    new, mu, nu, basis = _matrices.unzip(found, updates, 4)
    new = _matrices.shaped_as(new, updates)
    count = optax.safe_increment(state.count)
    return new, FrugalState(count, mu, nu, basis)

  return optax.GradientTransformation(init, update)


def columns(density: float, seed: int) -> Subspace:
  """Random columns, found again from the number of the subspace."""

  def chosen(shape, number):
    key = jax.random.fold_in(_matrices.shaped_key(seed, shape), number)
    order = jax.random.permutation(key, shape[-1])
    return order[: math.ceil(density * shape[-1])]

  def init(x):
    num = math.ceil(density * x.shape[-1])
    return jnp.zeros((0,)), (*x.shape[:-1], num)

  def down(g, basis, number):
    del basis
    return g[..., chosen(g.shape[-2:], number)]

  def up(full, g, basis, number):
    del basis
    at = chosen(g.shape[-2:], number)
    return jnp.zeros_like(g).at[..., at].set(full)

  return Subspace(init, lambda g, basis, number: basis, down, up)


def svd(density: float, seed: int) -> Subspace:
  """The first singular vectors, of the smaller side, of a gradient."""
  del seed

  def flat(g):
    return g.mT if g.shape[-2] > g.shape[-1] else g

  def init(x):
    x = flat(x)
    num = math.ceil(density * x.shape[-2])
    basis = jnp.zeros((*x.shape[:-1], num))
    return basis, (*x.shape[:-2], num, x.shape[-1])

  def renew(g, basis, number):
    del number
    u = jax.lax.platform_dependent(
      flat(g),
      cpu=_jacobi.left_singular_vectors,
      default=lambda g: jnp.linalg.svd(g, full_matrices=False)[0],
    )
    return u[..., : basis.shape[-1]]

  def down(g, basis, number):
    del number
    return basis.mT @ flat(g)

  def up(full, g, basis, number):
    del number
    x = basis @ full
    return x.mT if g.shape[-2] > g.shape[-1] else x

  return Subspace(init, renew, down, up)
