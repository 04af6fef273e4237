"""Muon: the momentum of each matrix, orthogonalised.

Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein, "Muon: An optimizer for
hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/; with the weight decay and the scale
of Liu et al., "Muon is Scalable for LLM Training", 2025,
https://arxiv.org/abs/2502.16982: updates have the root mean square 0.2 that
AdamW's typically have, whatever the shape of the matrix, so that AdamW, which
takes the embeddings and vectors, shares the learning rate and the decay.

`optax.contrib.muon` is another: unless told the dimensions of every leaf, it
silently sends whatever has not exactly two to Adam, as are our stacks of layers
`[L, D, F]`, and cannot know that the attention kernel `[L, D, N, H]` is a
matrix `[D, N H]` of each layer. It also corrects the momentum's bias, which
after orthogonalisation does nothing without Nesterov's step.

Deviations:

* The iteration runs in float32 unless `ns_dtype` says otherwise; the papers run
  it in bfloat16.
* An attention kernel is one matrix of all its heads.
* Liu et al. distribute by gathering each matrix onto one of the devices that
  hold its parts. `spread` does so for whole stacks: every device orthogonalises
  layers of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import _matrices
from jaxtrain.optimizers import base
from jaxtrain.sharding.spread import Spread

_A, _B, _C = 3.4445, -4.7750, 2.0315


class MuonState(NamedTuple):
  """State of `scale_by_muon`: momentum of the parameters' shapes and dtypes."""

  momentum: Any


def muon(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  weight_decay: float = 0.1,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  ns_dtype: Any = jnp.float32,
  spread: Spread | None = None,
) -> optax.GradientTransformation:
  r"""Orthogonalised momentum for matrices, AdamW for what is none.

  .. math:: M_t = \mu M_{t-1} + G_t, \quad
    W_t = W_{t-1} - \eta_t (0.2 \sqrt{\max(R, C)} \, O_t + \lambda W_{t-1})

  with :math:`O_t` the Newton-Schulz iteration of :math:`\mu M_t + G_t` (of
  :math:`M_t` without `nesterov`).

  Args:
    learning_rate: Step size or schedule, of AdamW too.
    momentum: :math:`\mu`.
    nesterov: Looks one step ahead, as Jordan et al. do.
    ns_steps: Iterations.
    weight_decay: Decoupled weight decay :math:`\lambda`.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. `None` is everything.
    b1: AdamW's decay of the first moment.
    b2: AdamW's decay of the second moment.
    eps: AdamW's, added to the denominator.
    ns_dtype: Dtype of the iteration.
    spread: Calls a function of `[L, (E,) R, C]` so that devices share L; see
      `jaxtrain.sharding.spread.over_leading`. Without it every device takes
      part in every matrix, or does all of them where parameters are replicated.

  Returns:
    The optax transformation.
  """
  return _matrices.beside_adamw(
    scale_by_muon(momentum, nesterov, ns_steps, ns_dtype, spread),
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
  )


def scale_by_muon(
  momentum: float = 0.95,
  nesterov: bool = True,
  ns_steps: int = 5,
  ns_dtype: Any = jnp.float32,
  spread: Spread | None = None,
) -> optax.GradientTransformation:
  """What `muon` does with matrices; every leaf must be one."""

  def init(params):
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def direction(x):
    iterate = lambda x: newton_schulz(x, ns_steps)
    x = x.astype(ns_dtype)
    x = spread(iterate, x) if spread else iterate(x)
    return 0.2 * max(x.shape[-2:]) ** 0.5 * x.astype(jnp.float32)

  def update(updates, state, params=None):
    del params
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    add = lambda m, g: momentum * m + g
    grads = wide(updates)
    new = jax.tree.map(add, wide(state.momentum), grads)
    ahead = jax.tree.map(add, new, grads) if nesterov else new
    found = _matrices.map_matrices(direction, ahead)
    new = _matrices.shaped_as(new, state.momentum)
    return _matrices.shaped_as(found, updates), MuonState(new)

  return optax.GradientTransformation(init, update)


def newton_schulz(x: jax.Array, steps: int = 5) -> jax.Array:
  """Matrices with singular values pushed towards 1: between about 0.7 and 1.2.

  Args:
    x: `[..., R, C]`; a matrix of zeros stays one.
    steps: Iterations of the polynomial of Jordan et al.
  """
  # Products X X^T are of the smaller side.
  is_tall = x.shape[-2] > x.shape[-1]
  x = x.mT if is_tall else x
  square = jnp.square(x.astype(jnp.float32))
  norm = jnp.sqrt(jnp.sum(square, axis=(-2, -1), keepdims=True))
  x = (x / jnp.where(norm > 0, norm, 1.0)).astype(x.dtype)
  for _ in range(steps):
    gram = x @ x.mT
    x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
  return x.mT if is_tall else x
