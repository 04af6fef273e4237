"""Every scheduler respects the budget and lets every request finish."""

import dataclasses
import random

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxserve import schedulers
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate

_NUM_PAGES, _PAGE_SIZE = 24, 4
_MACHINE = Machine(
  CostModel(fixed_s=0.1, token_s=0.01, kv_token_s=0.0),
  max_tokens=32,
  max_requests=4,
  num_pages=_NUM_PAGES,
  page_size=_PAGE_SIZE,
)
# Their docstrings say so: they are for work that is known from the start.
_STARVES = {'prefix_grouped'}


@dataclasses.dataclass
class _Checked:
  """Asserts what every plan must be; a twin must plan the same.

  The twin sees the requests in another order. Now and then a decoding request
  is hidden, as the engine hides one whose last token has not been read.
  """

  name: str
  hides: bool = False

  def __post_init__(self):
    self._rng = random.Random(0)
    self._schedule = schedulers.get(self.name)()
    self._twin = schedulers.get(self.name)()

  def __call__(self, requests, budget):
    hidden = [r for r in requests if r.is_decoding and self._rng.random() < 0.3]
    if self.hides and len(hidden) < len(requests):
      shown = [r for r in requests if r not in hidden]
      rows = budget.max_requests - len(hidden)
      plan = self._plan(shown, dataclasses.replace(budget, max_requests=rows))
      if plan.run:
        return plan
    plan = self._plan(requests, budget)
    assert plan.run, 'an engine would stand still'
    return plan

  def _plan(self, requests, budget):
    shuffle = lambda: self._rng.sample(requests, len(requests))
    plan = self._schedule(shuffle(), budget)
    twin = self._twin(shuffle(), budget)
    assert plan == twin and list(plan.run) == list(twin.run)
    by_id = {r.id: r for r in requests}
    assert set(plan.run) | set(plan.preempt) <= set(by_id)
    assert not set(plan.run) & set(plan.preempt)
    assert len(set(plan.preempt)) == len(plan.preempt)
    assert all(by_id[i].is_running for i in plan.preempt)
    stopped = set(plan.preempt)
    running = {r.id for r in requests if r.is_running} - stopped
    assert len(running | set(plan.run)) <= budget.max_requests
    assert sum(plan.run.values()) <= budget.max_tokens
    free = budget.free_pages + sum(by_id[i].num_pages for i in stopped)
    for i, count in plan.run.items():
      r = by_id[i]
      start = budget.start(r)
      assert 1 <= count <= r.num_tokens - start
      free -= budget.num_new_pages(r, start + count)
    assert free >= 0
    return plan


@st.composite
def _arrival(draw):
  """A request that fits the pool; the prompts are two texts with own ends."""
  length = draw(st.integers(1, _NUM_PAGES * _PAGE_SIZE - 1))
  text = draw(st.integers(0, 1))
  shared = draw(st.integers(0, length))
  end = draw(st.integers(0, 3))
  num_generated = draw(st.integers(1, _NUM_PAGES * _PAGE_SIZE - length))
  return Arrival(
    time_s=draw(st.floats(0, 8)),
    prompt=(text,) * shared + (10 + end,) * (length - shared),
    num_generated=num_generated,
    max_tokens=draw(
      st.integers(num_generated, _NUM_PAGES * _PAGE_SIZE - length)
    ),
    priority=draw(st.integers(-2, 2)),
    client=draw(st.sampled_from('abc')),
  )


@pytest.mark.parametrize('name', schedulers.names())
@settings(max_examples=40)
@given(
  st.lists(_arrival(), min_size=1, max_size=16), st.booleans(), st.booleans()
)
def test_budget_and_progress(name, arrivals, keeps_prefixes, hides):
  machine = dataclasses.replace(_MACHINE, keeps_prefixes=keeps_prefixes)
  result = simulate(_Checked(name, hides), arrivals, machine)
  for a, s in zip(arrivals, result.served, strict=True):
    assert len(s.token_s) == a.num_generated
    assert s.token_s == sorted(set(s.token_s)) and s.token_s[0] > a.time_s


def _flood():
  """A long request among many of the kind that any policy may prefer."""
  long = Arrival(0.5, tuple(range(60)), 30, priority=0, client='long')
  preferred = [
    Arrival(0.12 * i, (7,) * 8 + (i,), 4, priority=1, client='flood')
    for i in range(1800)
  ]
  return [long, *preferred]


@pytest.mark.parametrize('name', schedulers.names())
def test_nobody_starves(name):
  arrivals = _flood()
  result = simulate(_Checked(name), arrivals, _MACHINE)
  done = result.served[0].token_s[-1]
  is_served_during_the_flood = done < arrivals[-1].time_s
  assert is_served_during_the_flood != (name in _STARVES)


def test_a_scheduler_that_runs_nobody_is_found_out():
  with pytest.raises(RuntimeError, match='nobody runs, 1 requests wait'):
    simulate(
      lambda requests, budget: schedulers.base.Plan({}),
      [Arrival(0.0, (1, 2), 1)],
      _MACHINE,
    )
