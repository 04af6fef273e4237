"""Any rectangle of a parameter is the rectangle of the whole parameter."""

import hypothesis
from hypothesis import strategies as st
import numpy as np

from jaxtrain.checkpoints import layout
from jaxtrain.models.families import Weight

_SIZES = dict(L=3, V=5, D=6, N=4, K=2, H=8, F=7, E=2)
_RNG = np.random.default_rng(0)


def _pairs_to_halves(x):
  """H = (i, half) to H = (half, i), on the last dimension."""
  return x.reshape(*x.shape[:-1], 4, 2).swapaxes(-1, -2).reshape(x.shape)


def _query(stored):
  # [L][NH, D] -> [L, D, N, H]
  return np.stack([x.reshape(4, 8, 6).transpose(2, 0, 1) for x in stored])


def _out(stored):
  # [L][D, NH] -> [L, N, H, D]
  return np.stack([x.reshape(6, 4, 8).transpose(1, 2, 0) for x in stored])


# Weight, shape of a stored tensor, and the parameter from all stored tensors.
_CASES = [
  (Weight('e', 'V D', 'V D'), (5, 6), lambda x: x[0]),
  (Weight('h', 'D V', 'V D'), (5, 6), lambda x: x[0].T),
  (Weight('n.{L}', 'L D', 'D', plus=1.0), (6,), lambda x: np.stack(x) - 1),
  (Weight('q.{L}', 'L D N H', 'NH D'), (32, 6), _query),
  (
    Weight('p.{L}', 'L D N H', 'NH D', is_interleaved=True),
    (32, 6),
    lambda x: _pairs_to_halves(_query(x)),
  ),
  (
    Weight('b.{L}', 'L K H', 'KH'),
    (16,),
    lambda x: np.stack(x).reshape(3, 2, 8),
  ),
  (Weight('o.{L}', 'L N H D', 'D NH'), (6, 32), _out),
  (
    Weight('x.{L}.{E}', 'L E D F', 'F D'),
    (7, 6),
    lambda x: np.stack(x).reshape(3, 2, 7, 6).swapaxes(2, 3),
  ),
  (
    Weight('g.{L}', 'L E D F', 'E 0F D'),
    (2, 14, 6),
    lambda x: np.stack(x)[:, :, :7].swapaxes(2, 3),
  ),
  (
    Weight('u.{L}', 'L E D F', 'E 1F D'),
    (2, 14, 6),
    lambda x: np.stack(x)[:, :, 7:].swapaxes(2, 3),
  ),
]


def _stored(weight, shape):
  names = [name for _, name in layout.stored_names(weight, _SIZES)]
  return {n: _RNG.standard_normal(shape).astype(np.float32) for n in names}


@hypothesis.given(st.data())
def test_a_rectangle_is_that_of_the_whole(data):
  weight, shape, whole = data.draw(st.sampled_from(_CASES))
  assert layout.stored_shape(weight, _SIZES) == shape
  stored = _stored(weight, shape)
  want = whole(list(stored.values()))
  assert layout.param_shape(weight, _SIZES) == want.shape
  index = []
  for size in want.shape:
    start = data.draw(st.integers(0, size - 1))
    index.append(slice(start, data.draw(st.integers(start + 1, size))))
  seen = []
  got = layout.read(
    weight,
    _SIZES,
    tuple(index),
    lambda name, at: stored[name][at],
    np.dtype(np.float32),
    seen.append,
  )
  np.testing.assert_array_equal(got, want[tuple(index)])
  assert sum(seen) == got.nbytes


def test_only_the_rows_needed_are_read():
  weight = Weight('q.{L}', 'L D N H', 'NH D')
  stored = _stored(weight, (32, 6))
  read = []

  def read_tensor(name, index):
    read.append((name, index))
    return stored[name][index]

  index = (slice(1, 2), slice(2, 4), slice(1, 3), slice(None))
  layout.read(weight, _SIZES, index, read_tensor, np.dtype(np.float32))
  assert read == [('q.1', (slice(8, 24), slice(2, 4)))]


def test_to_stored_undoes_reading():
  for weight, shape, whole in _CASES:
    if weight.is_interleaved or weight.plus or '0F' in weight.theirs:
      continue
    if '1F' in weight.theirs:
      continue
    stored = _stored(weight, shape)
    param = whole(list(stored.values()))
    for place, name in layout.stored_names(weight, _SIZES):
      got = layout.to_stored(weight, param[place])
      np.testing.assert_array_equal(got, stored[name])
