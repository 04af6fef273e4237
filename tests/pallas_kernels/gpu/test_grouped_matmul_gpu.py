"""The Hopper kernels of grouped_matmul, in JAX's interpreter of GPU kernels."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import hopper
from pallas_kernels.common import hopper_matmul
from pallas_kernels.grouped_matmul import cases
from pallas_kernels.grouped_matmul import pallas_gpu
from pallas_kernels.grouped_matmul import pallas_gpu_product
from pallas_kernels.grouped_matmul import reference

interpreted = pytest.mark.skipif(
  not hopper.can_interpret(),
  reason='this JAX has no interpreter of GPU kernels',
)
_TOLERANCE = 1e-2
# Few blocks share the tiles, so that each has several.
_GPU = hopper.Gpu('h200', num_sms=4)
# Empty groups, groups inside of eight rows, one of several tiles, and rows of
# none.
_SIZES = (70, 0, 2, 3, 140, 1, 0)
_ROWS = 237


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch):
  monkeypatch.setattr(hopper, 'current', lambda: _GPU)


def _inputs(sizes=_SIZES, num_rows=_ROWS, k=136, n=200):
  keys = jax.random.split(jax.random.key(0), 3)
  lhs = jax.random.normal(keys[0], (num_rows, k), jnp.bfloat16)
  rhs = jax.random.normal(keys[1], (len(sizes), k, n), jnp.bfloat16)
  d_out = jax.random.normal(keys[2], (num_rows, n), jnp.bfloat16)
  # What rows of no group hold must not reach anything.
  used = sum(sizes)
  return (
    lhs.at[used:].set(jnp.nan),
    rhs,
    jnp.array(sizes, jnp.int32),
    d_out.at[used:].set(jnp.nan),
  )


def _error(actual, expected):
  actual, expected = np.float32(actual), np.float32(expected)
  assert actual.shape == expected.shape
  scale = np.sqrt(np.mean(expected**2))
  return np.sqrt(np.mean((actual - expected) ** 2)) / (scale or 1.0)


def _value_and_gradients(f, lhs, rhs, sizes, d_out, **kwargs):
  def run(lhs, rhs, d_out):
    out, vjp = jax.vjp(lambda a, b: f(a, b, sizes, **kwargs), lhs, rhs)
    return out, *vjp(d_out.astype(out.dtype))

  return jax.jit(run)(lhs, rhs, d_out)


def _accepted():
  return list(_all_accepted())


def _all_accepted():
  for name, build in cases.SMALL.items():
    case = build(jax.random.key(0))
    lhs, rhs, _, scales = case['args']
    if lhs.dtype == rhs.dtype == jnp.bfloat16 and scales is None:
      yield pytest.param(case, id=name)


@interpreted
@pytest.mark.parametrize('case', _accepted())
def test_small_cases(case):
  lhs, rhs, sizes, _ = case['args']
  d_out = jax.random.normal(
    jax.random.key(1), (lhs.shape[0], rhs.shape[2]), jnp.bfloat16
  )
  args = (lhs, rhs, sizes, d_out)
  expected = _value_and_gradients(
    reference.grouped_matmul, *args, **case['kwargs']
  )
  with hopper.interpret(detect_races=True):
    actual = _value_and_gradients(
      pallas_gpu.grouped_matmul, *args, **case['kwargs']
    )
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == e.dtype
    assert _error(a, e) < _TOLERANCE


def _expected(lhs, rhs, sizes, d_out):
  lhs, d_out = (jnp.nan_to_num(a) for a in (lhs, d_out))
  return _value_and_gradients(reference.grouped_matmul, lhs, rhs, sizes, d_out)


@interpreted
@pytest.mark.parametrize(
  'config',
  [
    dict(block_rows=128, block_n=128, slots=2, across=1, peers=1),
    dict(block_rows=64, block_n=128, slots=6, across=2, peers=2),
  ],
  ids=['two_slots', 'more_slots_than_steps_in_clusters'],
)
def test_boundaries_inside_of_tiles(config):
  lhs, rhs, sizes, d_out = _inputs()
  out, _, d_rhs = _expected(lhs, rhs, sizes, d_out)
  with hopper.interpret(detect_races=True):
    actual = jax.jit(
      functools.partial(pallas_gpu.grouped_matmul_forward, config=config)
    )(lhs, rhs, sizes)
    of_weights = {k: v for k, v in config.items() if k != 'block_rows'}
    _, actual_rhs = jax.jit(
      functools.partial(pallas_gpu.grouped_matmul_backward, config=of_weights)
    )(lhs, rhs, sizes, None, d_out)
  assert _error(actual, out) < _TOLERANCE
  np.testing.assert_array_equal(actual[sum(_SIZES) :], 0)
  assert _error(actual_rhs, d_rhs) < _TOLERANCE
  np.testing.assert_array_equal(actual_rhs[np.array(_SIZES) == 0], 0)


@interpreted
def test_gradient_of_rows():
  args = _inputs(n=72)
  _, expected, _ = _expected(*args)
  with hopper.interpret(detect_races=True):
    lhs, rhs, sizes, d_out = args
    actual, _ = jax.jit(pallas_gpu.grouped_matmul_backward)(
      lhs, rhs, sizes, None, d_out
    )
  assert _error(actual, expected) < _TOLERANCE
  np.testing.assert_array_equal(actual[sum(_SIZES) :], 0)


@interpreted
@pytest.mark.parametrize('broken', ['tile', 'rows'])
def test_a_broken_boundary_is_seen(monkeypatch, broken):
  if broken == 'tile':
    listed = pallas_gpu_product.tiles_of_rows

    def wrong(*args):
      group, top, low, high = listed(*args)
      return group, top, jnp.zeros_like(low), high

    monkeypatch.setattr(pallas_gpu_product, 'tiles_of_rows', wrong)
  else:
    monkeypatch.setattr(hopper_matmul, 'send_rows', lambda *args: None)
  lhs, rhs, sizes, _ = _inputs(n=64)
  expected = reference.grouped_matmul(jnp.nan_to_num(lhs), rhs, sizes)
  # Rows stored twice, by the wrong tile too, are also a race.
  with hopper.interpret():
    actual = jax.jit(pallas_gpu.grouped_matmul_forward)(lhs, rhs, sizes)
  assert not _error(actual, expected) < _TOLERANCE


def test_every_row_is_in_one_tile():
  rng = np.random.default_rng(0)
  for block_rows in (64, 128):
    for _ in range(20):
      shares = rng.dirichlet(np.full(9, 0.3))
      sizes = np.floor(shares * 1000).astype(np.int32)[:-1]
      group, top, low, high = map(
        np.asarray,
        pallas_gpu_product.tiles_of_rows(jnp.array(sizes), 1000, block_rows, 4),
      )
      assert len(group) % 4 == 0
      owner = np.full(1000, -1)
      for g, t, first, end in zip(group, top * 8, low, high, strict=True):
        assert (owner[t + first : t + end] == -1).all()
        owner[t + first : max(t + end, t + first)] = g
      expected = np.repeat(np.arange(9), [*sizes, 1000 - sizes.sum()])
      np.testing.assert_array_equal(owner, expected)


@pytest.mark.parametrize('case', _accepted())
def test_lowers_for_cuda(case):
  lhs, rhs, sizes, _ = case['args']
  d_out = jnp.zeros((lhs.shape[0], rhs.shape[2]), jnp.bfloat16)

  def run(lhs, rhs, d_out):
    out, vjp = jax.vjp(
      lambda a, b: pallas_gpu.grouped_matmul(a, b, sizes, **case['kwargs']),
      lhs,
      rhs,
    )
    return out, *vjp(d_out.astype(out.dtype))

  with pltpu.force_tpu_interpret_mode(None):
    traced = jax.jit(run).trace(lhs, rhs, d_out)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('mosaic_gpu') >= 3


@pytest.mark.parametrize(
  'lhs,rhs,scales,static',
  [
    (jnp.float32, jnp.float32, None, {}),
    (jnp.bfloat16, jnp.int8, (1, 8), {}),
    (
      jnp.bfloat16,
      jnp.bfloat16,
      None,
      dict(preferred_element_type=jnp.float16),
    ),
  ],
)
def test_declines(lhs, rhs, scales, static):
  scales = None if scales is None else jnp.ones(scales)
  with pytest.raises(NotImplementedError, match=r'float|int8'):
    pallas_gpu.grouped_matmul_forward(
      jnp.zeros((4, 8), lhs),
      jnp.zeros((1, 8, 8), rhs),
      jnp.array([4]),
      scales,
      **static,
    )
