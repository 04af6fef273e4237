"""Linear warm-up, then half a cosine down.

Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts",
ICLR 2017, https://arxiv.org/abs/1608.03983, equation 5, without restarts.
"""

import jax.numpy as jnp
import optax

from jaxtrain.schedules import base


def warmup_cosine(
  peak_value: float,
  num_steps: int,
  warmup_steps: int = 0,
  final_value: float = 0.0,
) -> optax.Schedule:
  r"""Warm-up and cosine decay.

  After the warm-up of W of the S steps,

  .. math:: \eta_{\min} + \frac{1}{2} (\eta_{\max} - \eta_{\min})
    \left(1 + \cos \pi \frac{s - W}{S - W} \right)

  Args:
    peak_value: :math:`\eta_{\max}`.
    num_steps: S, the step from which the value is `final_value`.
    warmup_steps: W.
    final_value: :math:`\eta_{\min}`.

  Returns:
    Function of the step.

  Raises:
    ValueError: A negative number of steps, or a warm-up longer than all.
  """
  base.check_steps(num_steps, warmup_steps=warmup_steps)

  def schedule(step):
    progress = base.progress(step, warmup_steps, num_steps)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    after = final_value + (peak_value - final_value) * cosine
    return base.with_warmup(step, peak_value, warmup_steps, after)

  return schedule
