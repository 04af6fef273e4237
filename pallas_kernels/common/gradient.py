"""Ops whose value and gradient are chosen apart.

Differentiating through `jax.lax.platform_dependent` would keep the residuals of
every platform's branch. So the rule is outside: both directions are functions
of the same residuals, whichever backend computes them.
"""

from collections.abc import Callable
from typing import Any

import jax


def with_gradient(
  forward: Callable[..., tuple[Any, Any]],
  backward: Callable[[Any, Any], tuple[Any, ...]],
  *args: Any,
) -> Any:
  """Calls `forward(*args)`, differentiated by `backward`.

  Args:
    forward: Returns the result and the residuals, a pytree that is the same
      for every backend.
    backward: Takes the residuals and the cotangent of the result; returns one
      cotangent per argument, `None` where there is none.
    *args: Arrays or `None`; no other array may be differentiated.

  Returns:
    The result.
  """

  @jax.custom_vjp
  def value(*args):
    return forward(*args)[0]

  value.defvjp(forward, backward)
  return value(*args)
