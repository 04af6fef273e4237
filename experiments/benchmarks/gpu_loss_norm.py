"""The loss of a large vocabulary, and the norm of every layer."""

import functools

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_floor
from experiments.benchmarks.gpu_record import Section
from experiments.benchmarks.gpu_timing import Contender
from experiments.benchmarks.gpu_timing import JaxCalls
from experiments.benchmarks.gpu_timing import compare
from experiments.benchmarks.gpu_timing import relative_error
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.rms_norm import rms_norm

_BF16 = jnp.bfloat16
# Llama 3 8B.
_TOKENS, _WIDTH, _VOCAB = 8192, 4096, 128256
# Rows and columns of gradients that are checked; tokens of a chunk of that.
_CHECKED, _CHUNK = 64, 1024
_LOSS_TOLERANCE, _TOLERANCE = 1e-3, 1e-2
_EPSILON = 1e-6
# Sets of arrays that the L2 cache can't keep together.
_SETS = 4


def loss(section: Section) -> None:
  """linear_cross_entropy, alone and with its gradients."""
  tokens, width, vocab = _TOKENS, _WIDTH, _VOCAB
  if section.smoke:
    tokens, width, vocab = 128, 64, 512
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (1, tokens, width), _BF16)
  head = jax.random.normal(keys[1], (width, vocab), _BF16) * width**-0.5
  targets = jax.random.randint(keys[2], (1, tokens), 0, vocab)
  weights = jax.random.bernoulli(keys[3], 0.9, (1, tokens)).astype(jnp.float32)
  args = x, head, targets, weights
  ways = {
    'ours': functools.partial(_ours, section.implementation),
    'xla': functools.partial(_ours, 'xla'),
    'logits in memory': _plain_loss,
  }
  expected = []

  def check(found):
    if not expected:
      expected.append(_expected_loss(*args))
    value, d_x, d_head = expected[0]
    if isinstance(found, tuple):
      found, (actual_x, actual_head) = found
      part = actual_x[0, :_CHECKED], actual_head[:, :_CHECKED]
      wrong = relative_error(part, (d_x, d_head))
      # In units of what the loss may be off by.
      error = wrong * _LOSS_TOLERANCE / _TOLERANCE
      return max(error, relative_error(found, value))
    return relative_error(found, value)

  for with_gradients in (False, True):
    factor = 3.0 if with_gradients else 1.0
    make = _with_gradients if with_gradients else (lambda f: f)
    flops = factor * 2.0 * tokens * width * vocab
    compare(
      section,
      f'loss of {tokens} tokens, {width} x {vocab}, '
      + ('forward + backward' if with_gradients else 'forward'),
      {
        name: Contender(
          functools.partial(JaxCalls, make(f), args),
          check,
          _LOSS_TOLERANCE,
          is_ours=name == 'ours',
        )
        for name, f in ways.items()
      },
      lambda us, flops=flops: gpu_floor.figures(section, us, flops=flops),
    )


def _ours(implementation, *args):
  return linear_cross_entropy(*args, implementation=implementation)[0]


def _plain_loss(x, head, targets, weights):
  logits = jnp.matmul(x, head).astype(jnp.float32)
  found = jax.nn.log_softmax(logits, axis=-1)
  found = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
  return -jnp.sum(found * weights)


def _with_gradients(f):
  return jax.value_and_grad(f, argnums=(0, 1))


@jax.jit
def _expected_loss(x, head, targets, weights):
  """The loss, some rows of the gradient of x, some columns of that of head."""
  f32 = lambda a: a.astype(jnp.float32)
  dot = functools.partial(jnp.matmul, precision='highest')
  x, targets, weights = (a[0] for a in (f32(x), targets, weights))
  chunk = min(_CHUNK, len(x))

  def of_chunk(args):
    x, targets = args
    logits = dot(x, f32(head))
    lse = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return lse, lse - at_target

  cut = lambda a: a.reshape(-1, chunk, *a.shape[1:])
  lse, nll = jax.lax.map(of_chunk, (cut(x), cut(targets)))
  lse, nll = lse.reshape(-1), nll.reshape(-1)

  def d_logits(rows, columns):
    p = jnp.exp(dot(x[rows], f32(head[:, columns])) - lse[rows][:, None])
    ids = jnp.arange(head.shape[1])[columns]
    p -= targets[rows][:, None] == ids
    return p * weights[rows][:, None]

  some, every = slice(0, _CHECKED), slice(None)
  d_x = dot(d_logits(some, every), f32(head).T)
  d_head = dot(x.T, d_logits(every, some))
  return jnp.sum(nll * weights), d_x, d_head


def norm(section: Section) -> None:
  """rms_norm with and without a residual, and its gradients."""
  shapes = ((8192, 4096), (262144, 128))
  for rows, width in ((64, 128),) if section.smoke else shapes:
    for with_residual, with_gradients in (
      (True, False),
      (False, False),
      (False, True),
    ):
      _norm_row(section, rows, width, with_residual, with_gradients)


def _norm_row(section, rows, width, with_residual, with_gradients):
  count = 1 if section.smoke else _SETS
  keys = jax.random.split(jax.random.key(0), 3 * count)
  normal = lambda key: jax.random.normal(key, (rows, width), _BF16)
  scale = 1 + 0.1 * jax.random.normal(keys[0], (width,), jnp.float32)
  scale = scale.astype(_BF16)
  # x, residual, gradient of the result.
  sets = [
    (normal(a), scale, normal(b) if with_residual else None, normal(c))
    for a, b, c in zip(keys[::3], keys[1::3], keys[2::3], strict=True)
  ]

  def calls(f):
    def call(x, scale, residual, d_out):
      if not with_gradients:
        return f(x, scale, residual)
      out, vjp = jax.vjp(lambda x, scale: f(x, scale, None), x, scale)
      return out, *vjp(d_out)

    return call

  by = lambda name: functools.partial(
    rms_norm, epsilon=_EPSILON, implementation=name
  )
  expected = []

  def check(found):
    if not expected:
      wide = jax.tree.map(lambda a: a.astype(jnp.float32), sets[0])
      if with_residual:
        # The sum is rounded, as a layer passes it on.
        total = (sets[0][0] + sets[0][2]).astype(jnp.float32)
        out = _plain_norm(total, wide[1])
        expected.append((out, total))
      else:
        expected.append(calls(_plain_norm)(*wide))
    return relative_error(found, expected[0])

  # Arrays that are read or written.
  arrays = 5 if with_gradients else 4 if with_residual else 2
  num_bytes = 2.0 * arrays * rows * width
  kind = 'with residual, forward' if with_residual else 'forward'
  kind += ' + backward' if with_gradients else ''
  compare(
    section,
    f'norm of {rows} x {width}, {kind}',
    {
      name: Contender(
        functools.partial(JaxCalls, calls(by(implementation)), *sets),
        check,
        _TOLERANCE,
        is_ours=name == 'ours',
      )
      for name, implementation in (
        ('ours', section.implementation),
        ('xla', 'xla'),
      )
    },
    lambda us: gpu_floor.figures(section, us, num_bytes=num_bytes),
  )


def _plain_norm(x, scale, residual=None):
  del residual
  return (
    x
    * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)
    * scale
  )
