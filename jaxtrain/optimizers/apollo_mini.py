"""APOLLO-Mini: APOLLO at rank one, with one scale for a whole matrix.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025,
https://arxiv.org/abs/2412.05270, algorithm 1. Of a matrix `[m, n]`, m at most
n, two vectors of n are all that is kept. Deviations are those of `apollo.py`.
"""

from collections.abc import Callable
from typing import Any

import optax

from jaxtrain.optimizers import _matrices
from jaxtrain.optimizers import apollo
from jaxtrain.optimizers import base


def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  scale: float = 128**0.5,
  update_proj_gap: int = 200,
  gamma: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
  seed: int = 0,
) -> optax.GradientTransformation:
  r"""Gradients scaled as AdamW would scale one projection of them.

  .. math:: W_{t+1} = W_t - \eta_t (\alpha \, s \, G_t + \lambda W_t), \quad
    s = \|\tilde R_t\| / \|R_t\|

  Args:
    learning_rate: Step size or schedule.
    scale: :math:`\alpha`, for what rank one underestimates.
    update_proj_gap: Steps between changes of the projection.
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
    apollo.scale_by_apollo(
      _per_tensor, 1, scale, update_proj_gap, gamma, b1, b2, eps, seed
    ),
    learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
  )


def _per_tensor(direction, r):
  return apollo.norm_ratio(direction, r, (-2, -1))
