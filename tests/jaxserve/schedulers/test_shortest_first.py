"""shortest_first: https://arxiv.org/abs/2306.06000 and abs/2408.15792."""

import itertools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.shortest_first import shortest_first
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate


class _Fixed:
  """Predicts what it was given, by the first token of the prompt."""

  def __init__(self, lengths):
    self.lengths = lengths
    self.observed = []

  def __call__(self, prompt, max_tokens):
    return self.lengths[prompt[0]]

  def observe(self, prompt, num_generated):
    self.observed.append((prompt, num_generated))


def _waiting(i, length=4, max_tokens=100):
  return base.Request(i, i, length, prompt=(i,) * length, max_tokens=max_tokens)


def _running(i, num_generated, max_tokens=100):
  total = 4 + num_generated
  pages = -(-(total - 1) // 4)
  return base.Request(i, i, total, total - 1, pages, True, (i,) * 4, max_tokens)


def _budget(max_requests=9, free_pages=999):
  return base.Budget(100, max_requests, free_pages, 4)


def test_shortest_first_and_ties_by_arrival():
  predictor = _Fixed({0: 9, 1: 5, 2: 7, 3: 5})
  schedule = shortest_first(predictor)
  requests = [_waiting(i) for i in range(4)]
  assert list(schedule(requests, _budget()).run) == [1, 3, 2, 0]
  assert list(schedule(requests, _budget(2)).run) == [1, 3]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_no_order_has_a_lower_mean_latency(lengths):
  # One row and steps of a second: the oracle must reach the best permutation.
  arrivals = [Arrival(0.0, (i,), n) for i, n in enumerate(lengths)]
  machine = Machine(CostModel(1.0, 0.0, 0.0), 8, 1, keeps_prefixes=False)
  result = simulate(shortest_first('oracle'), arrivals, machine)
  total = sum(s.token_s[-1] for s in result.served)
  assert total == min(
    sum(itertools.accumulate(order))
    for order in itertools.permutations(lengths)
  )


def test_an_overrun_doubles_the_prediction_and_the_memory():
  predictor = _Fixed({0: 8, 1: 1})
  newcomer = _waiting(1)
  for num_generated, expected in (
    (7, 8),
    (8, 16),
    (15, 16),
    (16, 32),
    (50, 64),
  ):
    schedule = shortest_first(predictor)
    runner = _running(0, num_generated)
    # Pages of prompt and answer but its last token, less those it has.
    more = -(-(4 + expected - 1) // 4) - runner.num_pages
    need = -(-(3 + num_generated + 1) // 4) - runner.num_pages
    more = max(more - need, 1) + need + 1  # And one for the newcomer.
    fits = schedule([runner, newcomer], _budget(free_pages=more)).run
    assert 1 in fits
    schedule = shortest_first(predictor)
    tight = schedule([runner, newcomer], _budget(free_pages=more - 1)).run
    assert 1 not in tight and 0 in tight
  # Never more than the request may have.
  schedule = shortest_first(predictor)
  runner = _running(0, 8, max_tokens=9)
  assert 1 in schedule([runner, newcomer], _budget(free_pages=2)).run


def test_the_longest_gives_way():
  predictor = _Fixed({0: 30, 1: 90, 2: 60})
  requests = [_running(i, 1) for i in range(3)]  # All at a page boundary.
  plan = shortest_first(predictor)(requests, _budget(free_pages=1))
  assert plan == base.Plan({0: 1, 2: 1}, (1,))


def test_who_was_left_out_for_long_goes_first():
  predictor = _Fixed({0: 50, **{i: 1 for i in range(1, 99)}})
  schedule = shortest_first(predictor, patience=5)
  order = []
  for step in range(8):
    requests = [_waiting(0), _waiting(step + 1)]
    order += list(schedule(requests, _budget(1)).run)
  # After five steps of patience, and until it runs.
  assert order == [1, 2, 3, 4, 5, 0, 0, 0]


def test_the_predictor_learns_from_those_that_left():
  predictor = _Fixed({0: 50, 1: 50})
  schedule = shortest_first(predictor)
  schedule([_waiting(0), _waiting(1)], _budget())
  schedule([_running(0, 3), _running(1, 1)], _budget())
  for _ in range(20):
    schedule([_running(1, 2)], _budget())
  # Seen with 3, and planned to decode once more.
  assert predictor.observed == [((0,) * 4, 4)]


def test_predictors_by_name():
  schedule = shortest_first('history', dict(quantile=0.9))
  assert schedule([_waiting(0)], _budget()).run == {0: 4}
  with pytest.raises(
    ValueError, match="no 'astrology'; known: history, oracle"
  ):
    shortest_first('astrology')
