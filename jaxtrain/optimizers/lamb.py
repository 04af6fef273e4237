"""LAMB: layer-wise adaptive moments for large batches.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76
minutes", ICLR 2020, https://arxiv.org/abs/1904.00962, algorithm 2.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import _matrices
from jaxtrain.optimizers import _sweep
from jaxtrain.optimizers import base
from jaxtrain.optimizers._sweep import Terms


def lamb(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  mask: Callable[[Any], Any] | Any = base.decay_mask,
) -> optax.GradientTransformation:
  r"""Adam whose step is rescaled per layer to the norm of its weights.

  With :math:`r_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)`, layer :math:`i`:

  .. math:: x_{t+1}^i = x_t^i - \eta_t
    \frac{\phi(\|x_t^i\|)}{\|r_t^i + \lambda x_t^i\|} (r_t^i + \lambda x_t^i)

  with :math:`\phi(z) = z`. A layer whose norm or update is zero takes ratio 1.
  "Layer" is one parameter array of one layer of the model.

  Args:
    learning_rate: Step size or schedule.
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the denominator, outside the square root.
    weight_decay: Decoupled weight decay :math:`\lambda`.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. By default matrices do, and norm scales and biases do not; `None`
      is everything.

  Returns:
    The optax transformation.
  """
  return optax.chain(
    scale_by_lamb(b1, b2, eps, weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


class Adapted(NamedTuple):
  """A leaf's gradient as the moments are to see it.

  Attributes:
    given: Arrays that it is made of, by name.
    stage: By name in the state of a leaf: functions of these arrays and of the
      leaf's state, that make it anew.
    value: Function of the same, with the new state: the gradient.
  """

  given: dict[str, jax.Array]
  stage: dict[str, Terms]
  value: Terms


class LambState(NamedTuple):
  """State of `scale_by_lamb`.

  Attributes:
    count: Updates made, int32.
    mu: First moments.
    nu: Second moments.
    adapted: What the adaption of a gradient keeps: of each leaf by name.
  """

  count: jax.Array
  mu: Any
  nu: Any
  adapted: Any


def as_it_is(updates: Any, count: jax.Array, **extra: Any) -> Any:
  """Gradients that are not adapted: a tree of `Adapted`."""
  del count, extra
  return jax.tree.map(
    lambda g: Adapted(dict(grad=g), {}, lambda x: _f32(x['grad'])), updates
  )


def scale_by_lamb(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any] | Any = None,
  adapt: Callable[..., Any] = as_it_is,
  keeps: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Adam's step with decay, rescaled to the norm of each layer's weights.

  Args:
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the denominator.
    weight_decay: Times the weights, added to the step.
    mask: What decays, as `lamb` has it.
    adapt: Of gradients, the number of this step and what an update is given
      besides: what the moments see, a tree of `Adapted`.
    keeps: Names of what `adapt` keeps of each leaf, zeros at first.

  Returns:
    The optax transformation; all of it, since norms of a step are cheap where
    the step is computed (`_sweep.py`).
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    adapted = jax.tree.map(
      lambda p: {name: jnp.zeros_like(p) for name in keeps}, params
    )
    return LambState(jnp.zeros((), jnp.int32), zeros(), zeros(), adapted)

  def update(updates, state, params=None, **extra):
    count = optax.safe_increment(state.count)
    hat = [1.0 / (1.0 - b**count) for b in (b1, b2)]
    moments = dict(
      mu=lambda x, g: b1 * _f32(x['mu']) + (1 - b1) * g(x),
      nu=lambda x, g: b2 * _f32(x['nu']) + (1 - b2) * jnp.square(g(x)),
    )

    step = lambda decays, x: _step(x, hat, eps, weight_decay * decays)

    def one(path, grad, param, decays, how, mu, nu, adapted):
      first = base.num_stacked_dims(path)
      gradient = {
        name: functools.partial(f, g=how.value) for name, f in moments.items()
      }
      kept, square = _sweep.sweep(
        [how.stage, gradient] if how.stage else [gradient],
        dict(
          param=lambda x: jnp.square(_f32(x['param'])),
          step=lambda x: jnp.square(step(decays, x)),
        ),
        dict(mu=mu, nu=nu) | adapted,
        how.given | dict(param=param),
        first,
      )
      new = _ratio(square) * step(decays, kept | dict(param=param))
      mu, nu = kept.pop('mu'), kept.pop('nu')
      return new.reshape(grad.shape).astype(grad.dtype), mu, nu, kept

    found = jax.tree_util.tree_map_with_path(
      one,
      updates,
      params,
      _decays(mask, params),
      adapt(updates, count, **extra),
      state.mu,
      state.nu,
      state.adapted,
    )
    new, *kept = _matrices.unzip(found, updates, 4)
    return new, LambState(count, *kept)

  return optax.GradientTransformationExtraArgs(init, update)


def _step(x, hat, eps, decay):
  root = jnp.sqrt(hat[1] * _f32(x['nu'])) + eps
  return hat[0] * _f32(x['mu']) / root + decay * _f32(x['param'])


def _ratio(square):
  """Norm of the weights over that of the step, 1 where one of them is 0."""
  has_ratio = (square['param'] > 0) & (square['step'] > 0)
  ratio = jnp.sqrt(square['param'] / square['step'])
  return jnp.where(has_ratio, ratio, 1.0)


def _decays(mask, params):
  if mask is None:
    return jax.tree.map(lambda _: True, params)
  return mask(params) if callable(mask) else mask


def _f32(x):
  return x.astype(jnp.float32)
