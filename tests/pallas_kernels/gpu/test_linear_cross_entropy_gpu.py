"""The Hopper kernel of linear_cross_entropy, interpreted, and lowered."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import hopper
from pallas_kernels.linear_cross_entropy import cases
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import pallas_gpu
from pallas_kernels.linear_cross_entropy import pallas_gpu_forward
from pallas_kernels.linear_cross_entropy import reference

_TOLERANCE = 1e-2
_ACCEPTED = [name for name in cases.SMALL if name.startswith('bf16')]

interpreted = pytest.mark.skipif(
  not hopper.can_interpret(),
  reason='this JAX has no interpreter of GPU kernels',
)


def _interpret(f, *args, races=False):
  with hopper.interpret(detect_races=races):
    return jax.block_until_ready(f(*args))


def _assert_close(actual, expected, tolerance=_TOLERANCE):
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.shape == e.shape and a.dtype == e.dtype
    a, e = np.float32(a), np.float32(e)
    rms = lambda a: np.sqrt(np.mean(np.square(a)))
    assert rms(a - e) <= tolerance * rms(e)
    assert np.abs(a - e).max() <= 10 * tolerance * np.abs(e).max()


def _loss_and_grads(f, case, **kwargs):
  f = functools.partial(f, **case['kwargs'], **kwargs)
  return jax.value_and_grad(f, case['diff'], has_aux=True)


@interpreted
@pytest.mark.parametrize('name', _ACCEPTED)
def test_equals_the_reference(name):
  case = cases.SMALL[name](jax.random.key(0))
  actual = _interpret(
    _loss_and_grads(pallas_gpu.linear_cross_entropy, case), *case['args']
  )
  expected = _loss_and_grads(reference.linear_cross_entropy, case)(
    *case['args']
  )
  _assert_close(actual, expected)


@interpreted
def test_the_value_alone_is_that_with_gradients():
  case = cases.SMALL['bf16_odd'](jax.random.key(0))
  f = functools.partial(pallas_gpu.linear_cross_entropy, **case['kwargs'])
  actual = _interpret(f, *case['args'])
  _assert_close(
    actual,
    reference.linear_cross_entropy(*case['args'], **case['kwargs']),
    1e-5,
  )


@interpreted
@pytest.mark.parametrize(
  'num_tokens, width, vocab, num_vocab, tile, stages, num_sms, cap, dtype',
  [
    # Blocks of several tiles; edges that TMA cuts; a ring that wraps.
    (200, 192, 208, 208, (128, 64), 2, 3, None, 'bfloat16'),
    # More stages than pieces; padded columns; a cap.
    (64, 64, 192, 130, (128, 128), 4, 1, 2.0, 'bfloat16'),
    # As many stages as pieces; fewer tiles than SMs; two parts of a tile.
    (264, 192, 192, 192, (256, 192), 3, 132, None, 'float16'),
  ],
)
def test_statistics_of_every_tile(
  monkeypatch,
  num_tokens,
  width,
  vocab,
  num_vocab,
  tile,
  stages,
  num_sms,
  cap,
  dtype,
):
  gpu = hopper.Gpu('h200', num_sms=num_sms)
  monkeypatch.setattr(hopper, 'current', lambda: gpu)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (num_tokens, width), dtype)
  head = jax.random.normal(keys[1], (width, vocab), dtype) * width**-0.5
  # Large logits come early in some rows, late in others, and some are far off.
  head = head.at[:, :2].multiply(20).at[:, num_vocab - 1].multiply(20)
  targets = jax.random.randint(keys[2], (num_tokens,), -9, num_vocab)
  run = functools.partial(
    pallas_gpu_forward.statistics,
    num_vocab=num_vocab,
    soft_cap=cap,
    keep=True,
    block_tokens=tile[0],
    block_vocab=tile[1],
    stages=stages,
    group=2,
  )
  stats, exp = _interpret(run, x, head, targets, races=True)
  alone = _interpret(
    functools.partial(run, keep=False), x, head, targets, races=True
  )
  np.testing.assert_allclose(alone[0], stats, rtol=1e-5, atol=1e-6)

  logits = np.float32(x) @ np.float32(head)[:, :num_vocab]
  slope = np.ones_like(logits)
  if cap:
    slope = 1 - np.tanh(logits / cap) ** 2
    logits = cap * np.tanh(logits / cap)
  assert stats.shape == (-(-vocab // tile[1]), 3, num_tokens)
  for i, of_tokens in enumerate(np.asarray(stats)):
    columns = slice(tile[1] * i, min(tile[1] * (i + 1), num_vocab))
    of_tile = logits[:, columns]
    largest = of_tile.max(1)
    exp_of_tile = np.exp(of_tile - largest[:, None])
    hit = np.arange(num_vocab)[columns] == np.asarray(targets)[:, None]
    np.testing.assert_allclose(of_tokens[0], largest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_tokens[1], exp_of_tile.sum(1), rtol=1e-4)
    np.testing.assert_allclose(
      of_tokens[2], (of_tile * hit).sum(1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      np.float32(exp)[:, columns],
      exp_of_tile * slope[:, columns],
      rtol=1e-2,
      atol=1e-3,
    )


def _statistics(x, head, targets, *, num_vocab, soft_cap, keep, **sizes):
  """What the kernel promises, by JAX."""
  block = sizes['block_vocab']
  num_tiles = -(-head.shape[1] // block)
  logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
  slope = 1.0
  if soft_cap is not None:
    slope = 1 - jnp.tanh(logits / soft_cap) ** 2
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  column = jnp.arange(head.shape[1])
  hit = column == targets[:, None]
  logits = jnp.where(column < num_vocab, logits, -1e30)
  tiles, slope, hit = (
    jnp.pad(
      a * jnp.ones_like(logits),
      ((0, 0), (0, num_tiles * block - head.shape[1])),
      constant_values=fill,
    ).reshape(len(x), num_tiles, block)
    for a, fill in ((logits, -1e30), (slope, 0), (hit, 0))
  )
  largest = tiles.max(-1)
  exp = jnp.exp(tiles - largest[..., None])
  target = jnp.sum(jnp.where(hit > 0, tiles, 0), -1)
  stats = jnp.stack([largest, exp.sum(-1), target]).transpose(2, 0, 1)
  exp = (exp * slope).astype(x.dtype).reshape(len(x), -1)
  return stats, exp if keep else None


def test_a_vocabulary_split_over_a_mesh_axis(monkeypatch):
  # The interpreter has kernels of one device at a time only.
  monkeypatch.setattr(pallas_gpu_forward, 'statistics', _statistics)
  mesh = jax.make_mesh(
    (2, 2),
    ('data', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )
  case = cases.SMALL['bf16'](jax.random.key(0))
  case['kwargs'] = dict(z_loss=1e-2, logit_soft_cap=5.0)

  def local(*args):
    loss, sums = pallas_gpu.linear_cross_entropy(
      *args, vocab_axes=('tensor',), chunk=8, **case['kwargs']
    )
    return jax.lax.psum((loss, sums), 'data')

  rows = jax.P('data')
  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(rows, jax.P(None, 'tensor'), rows, rows),
    out_specs=jax.P(),
  )
  grad = jax.value_and_grad(sharded, case['diff'], has_aux=True)
  actual = jax.jit(grad)(*case['args'])
  expected = _loss_and_grads(reference.linear_cross_entropy, case)
  _assert_close(actual, expected(*case['args']))


def _lower(f, *args):
  # Not by the interpreter of TPU kernels that tests turn on.
  with pltpu.force_tpu_interpret_mode(None):
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',))
  return lowered.as_text()


@pytest.mark.parametrize('name', [*_ACCEPTED, *cases.TPU])
def test_lowers_for_cuda(name):
  build = cases.TPU.get(name) or functools.partial(
    cases.SMALL[name], jax.random.key(0)
  )
  case = build()
  f = functools.partial(pallas_gpu.linear_cross_entropy, **case['kwargs'])
  assert 'custom_call @mosaic_gpu' in _lower(f, *case['args'])
  text = _lower(
    _loss_and_grads(pallas_gpu.linear_cross_entropy, case), *case['args']
  )
  assert 'custom_call @mosaic_gpu' in text


def test_chunks_share_one_array_of_exponentials():
  shape = jax.ShapeDtypeStruct
  num_tokens, vocab = 2048, 512
  args = (
    shape((1, num_tokens, 128), jnp.bfloat16),
    shape((128, vocab), jnp.bfloat16),
    shape((1, num_tokens), jnp.int32),
    shape((1, num_tokens), jnp.float32),
  )
  grad = jax.value_and_grad(
    functools.partial(pallas_gpu.linear_cross_entropy, chunk=256),
    has_aux=True,
  )
  sizes = set()

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      sizes.update(v.aval.size for v in eqn.outvars)
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        visit(inner)

  visit(jax.make_jaxpr(grad)(*args).jaxpr)
  assert max(sizes) <= max(256 * vocab, num_tokens * 128)


def test_declines_float32_and_shards():
  case = cases.SMALL['f32'](jax.random.key(0))
  with pytest.raises(NotImplementedError, match='float32'):
    linear_cross_entropy(*case['args'], implementation='pallas_gpu')
  case = cases.SMALL['bf16'](jax.random.key(0))
  with pytest.raises(NotImplementedError, match='shard_map'):
    linear_cross_entropy(
      *case['args'], shards=(2, 1), implementation='pallas_gpu'
    )
