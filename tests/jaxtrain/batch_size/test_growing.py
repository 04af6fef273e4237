"""Rows are used once and in order, tokens counted exactly, resumes exact."""

import numpy as np
import pytest

from jaxtrain import batch_size

_growing = batch_size.get('growing')
_ROWS, _T = 2, 4


class _Rows:
  """Batches of numbered rows."""

  def __iter__(self):
    return _Iterator()


class _Iterator:
  def __init__(self):
    self._next = 0

  def __next__(self):
    ids = np.arange(self._next, self._next + _ROWS)
    self._next += _ROWS
    return {'tokens': np.repeat(ids[:, None], _T, axis=1)}

  def get_state(self):
    return self._next

  def set_state(self, state):
    self._next = state


def _make(**kwargs):
  options = dict(rows=_ROWS, seq_len=_T, max_rows=8, patience=2, decay=0.0)
  return iter(_growing(_Rows(), **(options | kwargs)))


def _metrics(noise_scale, weight):
  """Of a step whose estimates are |G|^2 = 1 and S = `noise_scale`."""
  small, big = 4.0, 16.0
  return dict(
    grad_square_small=1 + noise_scale / small,
    grad_square_big=1 + noise_scale / big,
    batch_size_small=small,
    batch_size_big=big,
    weight=weight,
  )


def _run(iterator, steps, noise=100.0, ahead=0):
  """Batches of some steps, each observed `ahead` steps late."""
  batches, waiting = [], []
  for _ in range(steps):
    batches.append(next(iterator)['tokens'][:, 0])
    waiting.append(_metrics(noise, weight=3.0 * len(batches[-1])))
    if len(waiting) > ahead:
      iterator.observe(waiting.pop(0))
  for metrics in waiting:
    iterator.observe(metrics)
  return batches


@pytest.mark.parametrize('ahead', [0, 1])
def test_every_row_is_used_once_and_counted(ahead):
  iterator = _make()
  batches = _run(iterator, 8, ahead=ahead)
  sizes = [len(b) for b in batches]
  assert sizes[0] == _ROWS and sizes[-1] == 8
  rows = np.concatenate(batches)
  np.testing.assert_array_equal(rows, np.arange(len(rows)))
  assert iterator.state.consumed == len(rows) * _T
  assert iterator.tokens == 3 * len(rows)
  assert iterator.state.steps == 8
  assert len(set(sizes)) <= iterator.num_shapes == 3


def test_a_small_noise_scale_does_not_grow_the_batch():
  # Twice the batch is 16 tokens; the noise scale has to be as large.
  assert {len(b) for b in _run(_make(), 6, noise=15.5)} == {_ROWS}
  assert {len(b) for b in _run(_make(max_rows=4), 6, noise=17)} == {2, 4}


def test_a_resumed_iterator_goes_on_as_if_nothing_had_been():
  straight = _make(decay=0.9)
  noise = np.linspace(1, 60, 12)
  expected = []
  for n in noise:
    expected.append(next(straight)['tokens'][:, 0])
    straight.observe(_metrics(n, 8.0))
  first, found = _make(decay=0.9), []
  for i, n in enumerate(noise):
    if i == 5:
      state = first.get_state()
      first = _make(decay=0.9)
      first.set_state(state)
    found.append(next(first)['tokens'][:, 0])
    first.observe(_metrics(n, 8.0))
  assert len(expected[-1]) > _ROWS
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_array_equal(a, b)
  assert first.get_state() == straight.get_state()


def test_wrong_use_is_named():
  iterator = _make()
  next(iterator)
  with pytest.raises(RuntimeError, match='1 steps were not observed'):
    iterator.get_state()
  next(iterator)
  with pytest.raises(RuntimeError, match='2 steps were not observed'):
    next(iterator)
  with pytest.raises(ValueError, match='noise_scale=True'):
    iterator.observe({'loss': 1.0})
  with pytest.raises(ValueError, match='not one of growing batches'):
    _make().set_state({'index': 3})
  for _ in range(2):
    iterator.observe(_metrics(1.0, 8.0))
  state = iterator.get_state()
  with pytest.raises(ValueError, match='saved batch size 8 is not one of'):
    _make(rows=3, max_rows=6).set_state(state)
