"""AdamW: Adam with weight decay decoupled from the gradient.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
https://arxiv.org/abs/1711.05101, algorithm 2.

The paper multiplies the decay by the schedule but not by the step size alpha;
here, as in PyTorch and optax, `learning_rate` holds both, so the paper's lambda
is `learning_rate * weight_decay`.
"""

from collections.abc import Callable
from typing import Any

import optax

from jaxtrain.optimizers import base


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
  mu_dtype: Any = None,
) -> optax.GradientTransformation:
  r"""Adam, and a decay of the weights that the moments do not see.

  .. math:: x_{t+1} = x_t - \eta_t
    \left( \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} + \lambda x_t \right)

  Args:
    learning_rate: Step size or schedule.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the denominator, outside the square root.
    weight_decay: :math:`\lambda`.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. By default matrices do, and norm scales and biases do not; `None`
      is everything.
    mu_dtype: Dtype of the first moment; `None` is that of the parameters.

  Returns:
    The optax transformation.
  """
  return optax.chain(
    optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
