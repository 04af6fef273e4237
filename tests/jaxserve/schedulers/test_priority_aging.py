"""priority_aging: time dependent priorities (doi.org/10.1287/opre.15.1.104)."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.chunked_prefill import chunked_prefill
from jaxserve.schedulers.priority_aging import priority_aging
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate


def _request(i, priority=0, arrival_s=0.0, num_computed=0, num_tokens=10):
  return base.Request(
    id=i,
    arrival=i,
    num_tokens=num_tokens,
    num_computed=num_computed,
    num_pages=-(-num_computed // 16),
    is_running=num_computed > 0,
    priority=priority,
    arrival_s=arrival_s,
  )


def _budget(max_requests=99, now_s=0.0):
  return base.Budget(10**6, max_requests, 10**6, 16, now_s)


@given(
  st.lists(
    st.tuples(st.integers(-9, 9), st.integers(0, 99)), min_size=1, max_size=12
  ),
  st.sampled_from([0.25, 1.0, 4.0]),
  st.integers(100, 1000),
)
def test_runs_the_highest_effective_priority(requests, rate, now_s):
  requests = [_request(i, p, t) for i, (p, t) in enumerate(requests)]
  effective = lambda r: r.priority + rate * (now_s - r.arrival_s)
  expected = sorted(requests, key=lambda r: (-effective(r), r.arrival))
  schedule = priority_aging(rate)
  for rows in (1, 5, 99):
    plan = schedule(requests[::-1], _budget(rows, now_s))
    assert list(plan.run) == [r.id for r in expected[:rows]]


def test_takes_the_row_of_a_lower_priority_not_of_an_equal_one():
  running = [_request(0, 5, num_computed=9), _request(1, 1, num_computed=9)]
  schedule = priority_aging()
  plan = schedule([*running, _request(2, 3)], _budget(2))
  assert plan == base.Plan({0: 1, 2: 10}, (1,))
  plan = schedule([*running, _request(2, 1)], _budget(2))
  assert plan == base.Plan({0: 1, 1: 1})


def test_age_makes_up_for_priority():
  old = _request(0, priority=0, arrival_s=0.0)
  for arrival_s, first in ((9.0, 1), (11.0, 0)):
    young = _request(1, priority=1, arrival_s=arrival_s)
    plan = priority_aging(rate=0.1)([old, young], _budget(1, now_s=20.0))
    assert list(plan.run) == [first]


def test_is_first_come_first_served_among_equals():
  arrivals = [Arrival(0.3 * i, (i,) * (5 + i % 7), 3) for i in range(40)]
  machine = Machine(CostModel(0.1, 0.01, 0.0), 64, 4, keeps_prefixes=False)
  times = [
    [s.token_s for s in simulate(schedule, arrivals, machine).served]
    for schedule in (priority_aging(), chunked_prefill())
  ]
  assert times[0] == times[1]


def test_two_never_preempt_each_other_in_turns():
  arrivals = [Arrival(0.3 * i, (i,) * 8, 12, priority=i % 4) for i in range(60)]
  machine = Machine(CostModel(0.1, 0.0, 0.0), 64, 3, keeps_prefixes=False)
  seen = set()
  schedule = priority_aging(rate=0.5)

  def recorded(requests, budget):
    plan = schedule(requests, budget)
    waiting = {r.id for r in requests if not r.is_running}
    entered = [i for i in plan.run if i in waiting]
    seen.update(itertools.product(entered, plan.preempt))
    return plan

  simulate(recorded, arrivals, machine)
  assert seen and not {(b, a) for a, b in seen} & seen


@pytest.mark.parametrize(
  'kwargs, message', [(dict(rate=0), 'rate=0'), (dict(chunk=0), 'chunk=0')]
)
def test_wrong_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    priority_aging(**kwargs)
