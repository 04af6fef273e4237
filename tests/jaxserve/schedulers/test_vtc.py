"""vtc is algorithm 2 of https://arxiv.org/abs/2401.00588."""

import collections

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.fcfs import fcfs
from jaxserve.schedulers.vtc import vtc
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.metrics import service_gap
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate

# Steps of a second, in which every prompt fits.
_MACHINE = Machine(
  CostModel(1.0, 0.0, 0.0),
  max_tokens=10**6,
  max_requests=3,
  num_pages=10**4,
  keeps_prefixes=False,
)


def _algorithm_2(arrivals, max_requests, w_p, w_q):
  """The paper's two streams, a step at a time.

  Prefill and decode of an iteration are one step: it gives each request of the
  batch, new or old, one token.

  Returns:
    Who entered in each step, and the counters after it.
  """
  c, queue, batch, left = collections.defaultdict(int), [], {}, {}
  last, now, coming = None, 0.0, sorted(arrivals, key=lambda a: a[1].time_s)
  history = []
  while coming or queue or batch:
    if not queue and not batch:
      now = max(now, coming[0][1].time_s)
    while coming and coming[0][1].time_s <= now:
      i, r = coming.pop(0)
      u = r.client
      if not any(q.client == u for _, q in queue):
        if not queue:
          if last is not None:
            c[u] = max(c[u], c[last])
        else:
          c[u] = max(c[u], min(c[q.client] for _, q in queue))
      queue.append((i, r))
    new = []
    while queue and len(batch) < max_requests:
      k = min({q.client for _, q in queue}, key=lambda u: (c[u], u))
      at = next(n for n, (_, q) in enumerate(queue) if q.client == k)
      i, r = queue.pop(at)
      c[k] += w_p * len(r.prompt)
      new.append(i)
      batch[i], left[i] = r, r.num_generated
      last = k
    for i, r in list(batch.items()):
      c[r.client] += w_q
      left[i] -= 1
      if not left[i]:
        del batch[i]
    history.append((new, dict(c)))
    now += 1.0
  return history


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


@given(_ARRIVALS, st.integers(1, 3), st.integers(1, 4))
def test_is_algorithm_2(arrivals, w_p, w_q):
  schedule = vtc(chunk=100, prompt_weight=w_p, generated_weight=w_q)
  order = sorted(range(len(arrivals)), key=lambda i: arrivals[i].time_s)
  history, seen = [], set()

  def recorded(requests, budget):
    plan = schedule(requests, budget)
    new = [order[i] for i in plan.run if i not in seen]
    seen.update(plan.run)
    history.append((new, {u: c for u, c in schedule.counters.items() if c}))
    return plan

  simulate(recorded, arrivals, _MACHINE)
  expected = _algorithm_2(list(enumerate(arrivals)), 3, w_p, w_q)
  assert history == expected


@settings(max_examples=50)
@given(_ARRIVALS, st.integers(1, 3), st.integers(3, 4))
def test_service_of_backlogged_clients_differs_by_a_bounded_amount(
  arrivals, w_p, w_q
):
  longest = max(len(a.prompt) for a in arrivals)
  batch = 3 * (longest + max(a.num_generated for a in arrivals))
  bound = 2 * max(w_p * longest, w_q * batch)
  schedule = vtc(chunk=100, prompt_weight=w_p, generated_weight=w_q)
  result = simulate(schedule, arrivals, _MACHINE)
  gap = service_gap(result, prompt_weight=w_p, generated_weight=w_q)
  assert gap <= bound


def test_a_client_that_sends_more_gets_no_more():
  arrivals = [Arrival(0.5 * i, (0,) * 5, 5, client='heavy') for i in range(400)]
  arrivals += [Arrival(2.0 * i, (0,) * 5, 5, client='light') for i in range(99)]
  gaps = {
    name: service_gap(simulate(schedule, arrivals, _MACHINE))
    for name, schedule in dict(vtc=vtc(), fcfs=fcfs()).items()
  }
  assert gaps['vtc'] <= 2 * max(5, 2 * 3 * 10) < gaps['fcfs']


def test_idle_time_gives_no_credit():
  # `late` was away while `early` was served; it does not now go first for as
  # long, but takes turns.
  arrivals = [Arrival(0.0, (0,) * 4, 3, client='early') for _ in range(40)]
  arrivals += [Arrival(20.0, (0,) * 4, 3, client='late') for _ in range(20)]
  result = simulate(vtc(), arrivals, _MACHINE)
  entered = sorted(
    (s.enter_s, s.arrival.client) for s in result.served if s.enter_s >= 21
  )
  first = [client for _, client in entered[:18]]
  assert abs(first.count('late') - first.count('early')) <= 2


def test_one_that_found_no_room_is_not_charged():
  schedule = vtc()
  simulate(schedule, [Arrival(0.0, (0,) * 9, 4, client='a')], _MACHINE)
  assert schedule.counters == {'a': 9 + 2 * 4}
  schedule = vtc()
  waiting = base.Request(0, 0, 9, prompt=(0,) * 9, max_tokens=9, client='a')
  budget = base.Budget(99, 9, 99, 4)
  for _ in range(3):  # Planned, and each time not placed by the engine.
    assert schedule([waiting], budget).run == {0: 9}
    assert schedule.counters == {'a': 9 + 2}


@pytest.mark.parametrize('num_clients', [1, 5])
def test_is_work_conserving(num_clients):
  arrivals = [
    Arrival(0.0, (0,) * 3, 2 + i % 4, client=str(i % num_clients))
    for i in range(40)
  ]
  ends = [simulate(s, arrivals, _MACHINE).steps for s in (vtc(), fcfs())]
  busy = [sum(s.num_tokens > 0 for s in steps) for steps in ends]
  assert busy[0] <= busy[1]
