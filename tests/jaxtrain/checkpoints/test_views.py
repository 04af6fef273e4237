"""Rectangles of views are those of NumPy's arrays, and read no more."""

import math

import ml_dtypes
import numpy as np
import pytest

from jaxtrain.checkpoints import views


def _rectangle(rng, shape):
  ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in shape]
  return tuple(slice(a, b) for a, b in ends)


def _check(rng, view, expected, times=8):
  assert view.shape == expected.shape and view.dtype == expected.dtype
  for _ in range(times):
    index = _rectangle(rng, view.shape)
    got = view.read(index)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected[index])
  np.testing.assert_array_equal(view.read(views.whole(view.shape)), expected)


def _factors(rng, size):
  """A random shape of so many elements."""
  shape = []
  while size > 1:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    shape.append(int(rng.choice(divisors)))
    size //= shape[-1]
  return tuple(shape)


def test_each_view_is_numpys():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 6, 5)).astype(np.float32)
  y = rng.normal(size=(4, 2, 5)).astype(np.float32)
  a, b = views.in_memory('x', x), views.in_memory('y', y)
  order = (2, 0, 1)
  cases = [
    (views.transpose(a, order), x.transpose(order)),
    (views.cut(a, 1, 2, 5), x[:, 2:5]),
    (views.join([a, b, a], 1), np.concatenate([x, y, x], 1)),
    (
      views.pad(a, 2, 9, -1.5),
      np.pad(x, [(0, 0)] * 2 + [(0, 4)], constant_values=-1.5),
    ),
    (views.cast(a, ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16)),
    (views.scale(a, 3.0), x * np.float32(3)),
    (views.repeat(a, 3), np.stack([x] * 3)),
  ]
  for view, expected in cases:
    _check(rng, view, expected)
  assert [s.name for s in views.sources(views.join([a, b, a], 1))] == ['x', 'y']


@pytest.mark.parametrize('seed', range(4))
def test_any_reshape_is_numpys(seed):
  rng = np.random.default_rng(seed)
  for _ in range(100):
    shape = _factors(rng, int(rng.choice([1, 6, 16, 36, 60])))
    x = rng.normal(size=shape)
    new = _factors(rng, x.size)
    view = views.reshape(views.in_memory('x', x), new)
    _check(rng, view, x.reshape(new), times=3)
    # And through something that is cut and turned.
    turned = views.transpose(view, range(len(new))[::-1])
    back = views.reshape(turned, shape)
    _check(rng, back, x.reshape(new).T.reshape(shape), times=3)


def test_nothing_of_nothing():
  x = np.zeros((0, 3), np.float32)
  view = views.reshape(views.in_memory('x', x), (3, 0))
  assert view.read(views.whole((3, 0))).shape == (3, 0)


def _counting(x, read):
  def fetch(index):
    read.append(math.prod(s.stop - s.start for s in index))
    return x[index]

  return views.Stored('x', x.shape, x.dtype, fetch)


def test_a_shard_reads_its_rectangle_and_whole_rows_behind_a_reshape():
  x, read = np.arange(8.0 * 12 * 16).reshape(8, 12, 16), []
  stored = _counting(x, read)
  # A layer of a stack, a quarter of its columns.
  layer = views.reshape(views.cut(stored, 0, 3, 4), (12, 16))
  layer.read((slice(0, 12), slice(4, 8)))
  assert read == [12 * 4]
  # Of fused heads (16 = 4 x 4), the second head; and then half of each head.
  read.clear()
  heads = views.reshape(stored, (8, 12, 4, 4))
  heads.read((slice(0, 8), slice(0, 12), slice(1, 2), slice(0, 4)))
  assert read == [8 * 12 * 4]
  read.clear()
  heads.read((slice(0, 8), slice(0, 12), slice(0, 4), slice(0, 2)))
  assert read == [8 * 12 * 14]  # From the first to the last of a row.
  # Of what is joined and filled up, only the parts that are cut.
  read.clear()
  joined = views.pad(views.join([stored, stored], 0), 0, 20, 0.0)
  joined.read((slice(6, 8), slice(0, 12), slice(0, 16)))
  joined.read((slice(16, 20), slice(0, 12), slice(0, 16)))
  assert read == [2 * 12 * 16]
