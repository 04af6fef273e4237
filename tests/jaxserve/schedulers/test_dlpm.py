"""dlpm is algorithm 1 of https://arxiv.org/abs/2501.14312."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.dlpm import dlpm
from jaxserve.schedulers.vtc import vtc
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.metrics import service_gap
from jaxserve.simulate.metrics import summary
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate

_MACHINE = Machine(
  CostModel(1.0, 0.0, 0.0), 10**6, 3, num_pages=10**4, keeps_prefixes=False
)
_CACHED = (0, 3, 3, 6, 8)


def _algorithm_1(queue, deficits, capacity, quantum, w_e):
  """Lines of the admission loop, refilled as often as nobody can pay."""
  queue = sorted(queue, key=lambda r: (-_CACHED[r.id % 5], r.arrival))
  deficits, batch = dict(deficits), []
  while queue and len(batch) < capacity:
    admitted = False
    for r in list(queue):
      if len(batch) == capacity:
        break
      if deficits[r.client] > 0:
        deficits[r.client] -= w_e * (r.num_tokens - _CACHED[r.id % 5])
        batch.append(r.id)
        queue.remove(r)
        admitted = True
    if not admitted:
      for u, q in deficits.items():
        if q <= 0:
          deficits[u] += quantum
  return batch, deficits


@given(
  st.lists(
    st.tuples(st.sampled_from('abc'), st.integers(9, 40)),
    min_size=1,
    max_size=9,
  ),
  st.integers(1, 9),
  st.integers(1, 60),
  st.integers(1, 3),
)
def test_is_algorithm_1(clients, capacity, quantum, w_e):
  # Several calls, so that debts of one matter in the next.
  schedule = dlpm(quantum, chunk=100, prompt_weight=w_e, generated_weight=0)
  deficits = dict.fromkeys(sorted({c for c, _ in clients}), 0.0)
  for call in range(3):
    queue = [
      base.Request(i, i, n, prompt=(0,) * n, client=c)
      for i, (c, n) in enumerate(clients, len(clients) * call)
    ]
    budget = base.Budget(
      10**6, capacity, 10**6, 4, num_cached=lambda r: _CACHED[r.id % 5]
    )
    plan = schedule(queue, budget)
    batch, deficits = _algorithm_1(queue, deficits, capacity, quantum, w_e)
    assert list(plan.run) == batch
    assert schedule.deficits == pytest.approx(deficits)


_ARRIVALS = st.lists(
  st.builds(
    Arrival,
    time_s=st.integers(0, 40).map(float),
    prompt=st.integers(1, 9).map(lambda n: (0,) * n),
    num_generated=st.integers(1, 9),
    client=st.sampled_from('abcd'),
  ),
  min_size=1,
  max_size=30,
)


@settings(max_examples=50)
@given(_ARRIVALS, st.integers(1, 100))
def test_service_of_backlogged_clients_differs_by_a_bounded_amount(
  arrivals, quantum
):
  longest = max(len(a.prompt) for a in arrivals)
  batch = 3 * (longest + max(a.num_generated for a in arrivals))
  bound = 2 * (max(longest, 2 * batch) + quantum)
  result = simulate(dlpm(quantum), arrivals, _MACHINE)
  assert service_gap(result) <= bound


def test_a_large_quantum_is_longest_prefix_match():
  queue = [
    base.Request(i, i, 20, prompt=(0,) * 20, client='ab'[i % 2])
    for i in range(10)
  ]
  cached = lambda r: _CACHED[r.id % 5]
  budget = base.Budget(999, 10, 999, 4, num_cached=cached)
  run = dlpm(quantum=10**6)(queue, budget).run
  assert list(run) == sorted(range(10), key=lambda i: (-_CACHED[i % 5], i))


def test_reuses_more_than_vtc_and_is_as_fair_as_it_says():
  texts = [tuple(range(100 * t, 100 * t + 64)) for t in range(6)]
  arrivals = [
    Arrival(0.1 * i, texts[i * 7 % 6] + (i,), 4, client='ab'[i % 2])
    for i in range(200)
  ]
  machine = Machine(CostModel(1.0, 0.0, 0.0), 256, 4, num_pages=48, page_size=8)
  run = lambda schedule: simulate(schedule, arrivals, machine)
  fair, local = run(vtc()), run(dlpm(quantum=200))
  assert (
    summary(local).prefilled_fraction < 0.7 * summary(fair).prefilled_fraction
  )
  # By its own account, to which cached tokens are no service.
  assert service_gap(local, cached_weight=0.0) <= 2 * (2 * 4 * 69 + 200)


def test_refuses_no_quantum():
  with pytest.raises(ValueError, match='quantum=0'):
    dlpm(quantum=0)
