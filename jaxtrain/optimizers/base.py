"""What an optimizer is, and what optimizers must know of a parameter tree.

An optimizer is a function `x(learning_rate, ...) -> GradientTransformation`
with the paper's defaults; its moments keep the shape, dtype and sharding of the
parameters.

The layers of a model are stacked: a leaf under 'layers' has a leading dimension
L that no layer knows of. An optimizer treats such a leaf as L leaves.
"""

from typing import Any, Protocol

import jax
import optax

_STACK = 'layers'
_NOT_DECAYED = {'bias', 'scale'}


class Optimizer(Protocol):
  """Makes an optax transformation."""

  def __call__(
    self, learning_rate: optax.ScalarOrSchedule, **kwargs: Any
  ) -> optax.GradientTransformation: ...


def num_stacked_dims(path: tuple[Any, ...]) -> int:
  """Leading dimensions of a leaf that number layers: 1 under 'layers', or 0.

  Args:
    path: Key path of `jax.tree_util`.
  """
  return int(_STACK in _names(path))


def decay_mask(params: Any) -> Any:
  """Tree of bools: which parameters weight decay applies to.

  All but norm scales, biases and other vectors of a layer, for which decay has
  no use (they do not set the scale of what follows, or are meant to be
  anywhere).
  """

  def one(path, leaf):
    is_matrix = leaf.ndim - num_stacked_dims(path) >= 2
    return is_matrix and not set(_names(path)[-1:]) & _NOT_DECAYED

  return jax.tree_util.tree_map_with_path(one, params)


def _names(path):
  return [str(getattr(k, 'key', getattr(k, 'name', k))) for k in path]
