"""VRGD: steps as long, element by element, as the gradient's parts agree.

Jiang, Liu, Ding, Guo and Lin, "Accelerating Large Batch Training via Gradient
Signal to Noise Ratio (GSNR)", 2023, https://arxiv.org/abs/2309.13681:
algorithm 1 (VR-SGD), equations 7 to 10, and section 4.2 (VR-Momentum, VR-Adam,
VR-LARS, VR-LAMB).

VR-Adam and VR-LAMB are from the description in section 4.2, not from the
listings in appendix D, which we have not seen: the gradient is adapted before
the moments see it, by a GSNR that has a momentum of its own with bias
correction. So both moments are of the adapted gradient, and the base optimizer
is otherwise as it is.

Deviations: "layer" is one parameter array of one layer of the model. The
variance is at least `_FLOOR` times the mean square: float32 does not know it
better, and parts that agree exactly (or a single part) would have an infinite
ratio. Where gradients are zero in every part the ratio is zero, thus gamma.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optimizers import _sweep
from jaxtrain.optimizers import base as base_lib
from jaxtrain.optimizers import lamb
from jaxtrain.optimizers.adamw import adamw
from jaxtrain.optimizers.lars import lars

_FLOOR = 1e-6


def vrgd(
  learning_rate: optax.ScalarOrSchedule,
  base: str = 'lamb',
  gamma: float = 0.1,
  b3: float = 0.9,
  weight_decay: float | None = None,
  mask: Callable[[Any], Any] | Any = base_lib.decay_mask,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  r"""A base optimizer that sees gradients scaled by their signal to noise.

  With :math:`\tilde g` the mean of the parts' gradients :math:`g_d`, and
  :math:`\langle \cdot \rangle_l` the mean over a layer:

  .. math::
    \sigma^2 &= \frac1k \sum_d g_d^2 - \tilde g^2, \qquad
    r = \tilde g^2 / \sigma^2 \\
    r &\gets \min(\max(r / \langle r \rangle_l, \gamma), 1), \qquad
    \hat g = r \tilde g

  For 'adam' and 'lamb', :math:`\hat g = \hat p \tilde g` with :math:`\hat p`
  the bias-corrected moving average of :math:`r`.

  The update takes one thing more: `tx.update(grads, state, params,
  mean_square=tree)`, the mean over the parts (devices, or micro-batches: the
  paper wants 8 at least) of the square of each part's mean gradient; a tree
  like `grads`, scaled as they are (if they are clipped by c, it by c^2).

  Args:
    learning_rate: Step size or schedule.
    base: 'sgd', 'momentum', 'adam' (with decoupled decay), 'lars' or 'lamb'.
    gamma: Least ratio.
    b3: Decay of the momentum of the ratio, for 'adam' and 'lamb'.
    weight_decay: As the base optimizer has it, whose default `None` is: for
      'sgd' and 'momentum' it is added to the scaled gradient, and 0.
    mask: Tree of bools, or a function of the parameters that makes one: what
      decays. By default matrices do, and norm scales and biases do not; `None`
      is everything.
    **kwargs: To the base optimizer, such as `b1` or `momentum`.

  Returns:
    The optax transformation.

  Raises:
    ValueError: `base` or `gamma` not as above; in the update, no `mean_square`.
  """
  if base not in _BASES:
    raise ValueError(f'base={base!r} must be one of {", ".join(_BASES)}')
  if not 0 < gamma <= 1:
    raise ValueError(f'gamma={gamma} must be above 0 and at most 1')
  if weight_decay is not None:
    kwargs['weight_decay'] = weight_decay
  if base == 'lamb':
    return _lamb(learning_rate, gamma, b3, mask=mask, **kwargs)
  return optax.chain(
    scale_by_gsnr(gamma, b3 if base == 'adam' else None),
    _BASES[base](learning_rate, mask=mask, **kwargs),
  )


class GsnrState(NamedTuple):
  """State of `scale_by_gsnr`: steps made, and the momentum of the ratio."""

  count: jax.Array
  ratio: Any


def scale_by_gsnr(
  gamma: float, b3: float | None = None
) -> optax.GradientTransformationExtraArgs:
  """Scales gradients by their ratio, or where `b3` is given by its momentum."""

  def init(params):
    if b3 is None:
      return optax.EmptyState()
    return GsnrState(
      jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
    )

  def update(updates, state, params=None, *, mean_square=None, **extra):
    del params, extra
    _check(mean_square)

    def of(path, grad, square):
      x = dict(grad=grad, mean_square=square)
      return _clipped(gamma, _mean(path, x), x)

    ratio = jax.tree_util.tree_map_with_path(of, updates, mean_square)
    correction = 1.0
    if b3 is not None:
      count = optax.safe_increment(state.count)
      correction = 1.0 / (1.0 - b3**count)
      average = lambda p, r: b3 * p + (1 - b3) * r
      ratio = jax.tree.map(average, state.ratio, ratio)
      kept = jax.tree.map(lambda r, p: r.astype(p.dtype), ratio, state.ratio)
      state = GsnrState(count, kept)
    scaled = lambda g, r: (correction * r * g).astype(g.dtype)
    return jax.tree.map(scaled, updates, ratio), state

  return optax.GradientTransformationExtraArgs(init, update)


def _lamb(
  learning_rate,
  gamma,
  b3,
  b1=0.9,
  b2=0.999,
  eps=1e-6,
  weight_decay=0.01,
  mask=None,
):
  """LAMB's pass over a leaf takes the ratio along: it is not scaled before."""

  def adapt(updates, count, *, mean_square=None, **extra):
    del extra
    _check(mean_square)
    correction = 1.0 / (1.0 - b3**count)

    def one(path, grad, square):
      given = dict(grad=grad, mean_square=square)
      mean = _mean(path, given)
      return lamb.Adapted(
        given,
        dict(
          ratio=lambda x: b3 * x['ratio'] + (1 - b3) * _clipped(gamma, mean, x)
        ),
        lambda x: correction * x['ratio'] * x['grad'].astype(jnp.float32),
      )

    return jax.tree_util.tree_map_with_path(one, updates, mean_square)

  return optax.chain(
    lamb.scale_by_lamb(b1, b2, eps, weight_decay, mask, adapt, ('ratio',)),
    optax.scale_by_learning_rate(learning_rate),
  )


def _check(mean_square):
  if mean_square is None:
    raise ValueError(
      'vrgd needs the mean over parts of the batch of their squared '
      'gradients: update(grads, state, params, mean_square=...), which '
      'make_train_step(..., mean_square=True) passes'
    )


def _ratio(x):
  """Float32 signal over noise, elementwise."""
  square = jnp.square(x['grad'].astype(jnp.float32))
  mean_square = x['mean_square'].astype(jnp.float32)
  noise = jnp.maximum(mean_square - square, _FLOOR * mean_square)
  return square / jnp.where(noise > 0, noise, 1.0)


def _mean(path, arrays):
  """Of the ratio over each layer."""
  first = base_lib.num_stacked_dims(path)
  _, total = _sweep.sweep([], dict(ratio=_ratio), {}, arrays, first)
  return total['ratio'] / math.prod(arrays['grad'].shape[first:])


def _clipped(gamma, mean, x):
  """The ratio with mean 1, and then between its limits."""
  return jnp.clip(_ratio(x) / jnp.where(mean > 0, mean, 1.0), gamma, 1.0)


def _momentum(
  learning_rate, mask, momentum=0.9, weight_decay=0.0
) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.trace(momentum) if momentum else optax.identity(),
    optax.scale_by_learning_rate(learning_rate),
  )


_BASES = {
  'sgd': functools.partial(_momentum, momentum=0.0),
  'momentum': _momentum,
  'adam': adamw,
  'lars': lars,
  'lamb': lamb.lamb,
}
