"""Virtual Token Counter: the least served client goes first.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
https://arxiv.org/abs/2401.00588, algorithm 2.

Deviation: prompts are computed in chunks behind the decodes, as
`chunked_prefill` does; a prompt is charged when it enters, as in the paper.
Between two clients that both have requests waiting, service differs by at most
`2 * max(prompt_weight * L, generated_weight * M)` over any time, L the longest
prompt and M the tokens a batch can hold (theorem 4.4).
"""

import collections
import heapq

from jaxserve.schedulers import _seen
from jaxserve.schedulers import base


def vtc(
  chunk: int = 512, prompt_weight: float = 1.0, generated_weight: float = 2.0
) -> base.Scheduler:
  """Admits the earliest request of the client with the smallest counter.

  Args:
    chunk: Tokens of one prompt that a step computes at most.
    prompt_weight: Cost of a prompt token, w_p.
    generated_weight: Cost of a generated token, w_q.
  """
  return Vtc(chunk, prompt_weight, generated_weight)


class Vtc:
  """The scheduler. `counters` are the virtual token counters."""

  def __init__(self, chunk: int, prompt_weight: float, generated_weight: float):
    self._chunk = chunk
    self._ledger = _seen.Ledger(prompt_weight, generated_weight)
    self._lift: dict[str, float] = {}
    self._last_client: str | None = None

  @property
  def counters(self) -> dict[str, float]:
    """Service of each client, plus what its counter was lifted by."""
    return {c: self._counter(c) for c in self._lift}

  def __call__(self, requests, budget):
    new = {r.id for r in self._ledger.settle(requests)}
    by_arrival = sorted(requests, key=lambda r: r.arrival)
    waiting = [r for r in by_arrival if not r.is_running]
    self._arrive(waiting, new)
    running = [r for r in by_arrival if r.is_running]
    running.sort(key=lambda r: not r.is_decoding)
    ordered = self._ordered(waiting, budget.max_requests)
    plan = base.admit(running + ordered, budget, self._chunk)
    entered = [r for r in ordered if r.id in plan.run]
    if entered:
      self._last_client = entered[-1].client
    self._ledger.charge(requests, plan, budget, lambda r: len(r.prompt))
    return plan

  def _counter(self, client):
    service = self._ledger.service.get(client, 0.0)
    return service + self._lift.get(client, 0.0)

  def _arrive(self, waiting, new):
    """Lines 6 to 14: a client that comes back does not bring old credit."""
    queued = {r.client for r in waiting if r.id not in new}
    for r in waiting:
      if r.id not in new:
        continue
      u = r.client
      self._lift.setdefault(u, 0.0)
      if u not in queued:
        floor = self._counter(u)
        if queued:
          floor = min(map(self._counter, queued))
        elif self._last_client is not None:
          floor = self._counter(self._last_client)
        self._lift[u] += max(floor - self._counter(u), 0.0)
        queued.add(u)

  def _ordered(self, waiting, count):
    """Lines 19 to 26: by client, each charged for its prompt as it is taken."""
    queues = collections.defaultdict(collections.deque)
    for r in waiting:
      queues[r.client].append(r)
    heap = [(self._counter(c), c) for c in queues]
    heapq.heapify(heap)
    ordered = []
    while heap and len(ordered) < count:
      counter, client = heapq.heappop(heap)
      r = queues[client].popleft()
      ordered.append(r)
      if queues[client]:
        cost = self._ledger.prompt_cost(len(r.prompt))
        heapq.heappush(heap, (counter + cost, client))
    return ordered
