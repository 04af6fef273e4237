"""prepacking is first fit decreasing (https://arxiv.org/abs/2404.09529)."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.prepacking import prepacking


def _request(i, num_tokens, num_computed=0):
  return base.Request(
    id=i,
    arrival=i,
    num_tokens=num_tokens,
    num_computed=num_computed,
    num_pages=-(-num_computed // 16),
    is_running=num_computed > 0,
  )


def _budget(max_tokens, max_requests=99):
  return base.Budget(max_tokens, max_requests, 10**6, 16)


def _first_fit_decreasing(lengths, capacity):
  """The paper's bins, as indices."""
  bins, room = [], []
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    b = next(
      (b for b, left in enumerate(room) if lengths[i] <= left), len(bins)
    )
    if b == len(bins):
      bins.append([])
      room.append(capacity)
    bins[b].append(i)
    room[b] -= lengths[i]
  return bins


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_is_the_first_bin_if_the_longest_is_the_oldest(lengths):
  lengths = sorted(lengths, key=lambda n: n != max(lengths))
  requests = [_request(i, n) for i, n in enumerate(lengths)]
  plan = prepacking()(requests, _budget(50))
  first, *_ = _first_fit_decreasing(lengths, 50)
  assert plan.run == {i: lengths[i] for i in first}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_bins_hold_whole_prompts_and_are_few(lengths):
  left = {i: _request(i, n) for i, n in enumerate(lengths)}
  fills = []
  while left:
    run = prepacking()(list(left.values()), _budget(50)).run
    assert all(n == lengths[i] for i, n in run.items())
    assert min(left) in run, 'the oldest waits'
    fills.append(sum(run.values()))
    for i in run:
      del left[i]
  # Two bins in a row hold more than one has room for, as in any first fit.
  assert all(a + b > 50 for a, b in zip(fills, fills[1:], strict=False))


def test_decodes_come_first_and_only_the_oldest_prompt_is_split():
  requests = [_request(0, 9, 8), _request(1, 80), _request(2, 30)]
  assert prepacking()(requests, _budget(50)).run == {0: 1, 1: 49}
  requests = [_request(0, 9, 8), _request(1, 80, 49), _request(2, 30)]
  # 31 to go, and 18 left for prompts: 2 is split, having become the oldest.
  assert prepacking()(requests, _budget(50)).run == {0: 1, 1: 31, 2: 18}


def test_only_the_window_is_packed():
  requests = [_request(0, 10), _request(1, 10), _request(2, 40)]
  assert prepacking()(requests, _budget(50)).run == {0: 10, 2: 40}
  assert prepacking(window=2)(requests, _budget(50)).run == {0: 10, 1: 10}


def test_refuses_an_empty_window():
  with pytest.raises(ValueError, match='window=0'):
    prepacking(window=0)
