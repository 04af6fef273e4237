"""Linear warm-up, a long plateau, and a short decay (WSD).

Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with
Scalable Training Strategies", COLM 2024, https://arxiv.org/abs/2404.06395,
equation 1. The plateau does not know where it ends, so training can go on from
any checkpoint of it.

The paper leaves the shape of the decay open; it is one minus a square root, the
best of those compared by Hägele et al., "Scaling Laws and Compute-Optimal
Training Beyond Fixed Training Durations", https://arxiv.org/abs/2405.18392.
"""

import jax.numpy as jnp
import optax

from jaxtrain.schedules import base


def warmup_stable_decay(
  peak_value: float,
  num_steps: int,
  warmup_steps: int = 0,
  decay_steps: int | None = None,
  final_value: float = 0.0,
) -> optax.Schedule:
  r"""Warm-up, plateau and decay.

  In the last D of the S steps,

  .. math:: \eta_{\min} + (\eta_{\max} - \eta_{\min})
    \left(1 - \sqrt{\frac{s - (S - D)}{D}} \right)

  Args:
    peak_value: :math:`\eta_{\max}`, the value on the plateau.
    num_steps: S, the step from which the value is `final_value`.
    warmup_steps: Steps of the warm-up.
    decay_steps: D; `None` is a tenth of `num_steps`, as in the paper.
    final_value: :math:`\eta_{\min}`.

  Returns:
    Function of the step.

  Raises:
    ValueError: A negative number of steps, or warm-up and decay longer than
      all.
  """
  if decay_steps is None:
    decay_steps = max(min(num_steps // 10, num_steps - warmup_steps), 0)
  base.check_steps(
    num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps
  )

  def schedule(step):
    progress = base.progress(step, num_steps - decay_steps, num_steps)
    shape = 1 - jnp.sqrt(progress)
    after = final_value + (peak_value - final_value) * shape
    return base.with_warmup(step, peak_value, warmup_steps, after)

  return schedule
