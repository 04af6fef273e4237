"""Deficit Longest Prefix Match: what is cached first, fair between clients.

Cao et al., "Locality-aware Fair Scheduling in LLM Serving",
https://arxiv.org/abs/2501.14312, algorithm 1.

Waiting requests are taken by longest cached prefix, of clients with a positive
deficit only. A client pays for the tokens of its prompt that have to be
computed (the extension) and for those it generates; once no waiting client can
pay, each that is in debt gets a quantum. A quantum near 0 is fair queueing, a
large one longest-prefix-match. Fairness is between clients: of one client, a
request without a cached prefix may wait as long as others with one come.

Deviations: prompts are computed in chunks behind the decodes, and of many
waiting requests the cache is asked for the oldest `window` of each client only.
"""

import collections

from jaxserve.schedulers import _seen
from jaxserve.schedulers import base


def dlpm(
  quantum: float = 1024,
  chunk: int = 512,
  prompt_weight: float = 1.0,
  generated_weight: float = 2.0,
  window: int = 128,
) -> base.Scheduler:
  """Admits the longest cached prefix among the clients that can pay.

  Args:
    quantum: Service a client in debt is given at a refill, Q^u.
    chunk: Tokens of one prompt that a step computes at most.
    prompt_weight: Cost of a prompt token that is computed, w_e.
    generated_weight: Cost of a generated token, w_q.
    window: Waiting requests of a client that are considered.

  Raises:
    ValueError: `quantum` is not positive.
  """
  if quantum <= 0:
    raise ValueError(f'quantum={quantum} must be positive')
  return Dlpm(quantum, chunk, prompt_weight, generated_weight, window)


class Dlpm:
  """The scheduler. `deficits` is what each client may still spend."""

  def __init__(self, quantum, chunk, prompt_weight, generated_weight, window):
    self._quantum = quantum
    self._chunk = chunk
    self._window = window
    self._ledger = _seen.Ledger(prompt_weight, generated_weight)
    self._refilled: dict[str, float] = {}

  @property
  def deficits(self) -> dict[str, float]:
    """Refills of each client less its service."""
    service = self._ledger.service
    return {c: q - service.get(c, 0.0) for c, q in self._refilled.items()}

  def __call__(self, requests, budget):
    for r in self._ledger.settle(requests):
      self._refilled.setdefault(r.client, 0.0)
    by_arrival = sorted(requests, key=lambda r: r.arrival)
    running = [r for r in by_arrival if r.is_running]
    running.sort(key=lambda r: not r.is_decoding)
    waiting = [r for r in by_arrival if not r.is_running]
    extension = {}
    ordered, refills = self._ordered(waiting, budget, extension)
    plan = base.admit(running + ordered, budget, self._chunk)
    # Refills that came after the last one to enter have not taken place.
    entered = [
      n for r, n in zip(ordered, refills, strict=True) if r.id in plan.run
    ]
    for client, count in (entered[-1] if entered else {}).items():
      self._refilled[client] += count * self._quantum
    self._ledger.charge(requests, plan, budget, lambda r: extension[r.id])
    return plan

  def _ordered(self, waiting, budget, extension):
    """Requests as they would enter, and each client's refills by then."""
    queues = collections.defaultdict(list)
    for r in waiting:
      if len(queues[r.client]) < self._window:
        queues[r.client].append(r)
        extension[r.id] = r.num_tokens - budget.start(r)
    left = sorted(
      (r for queue in queues.values() for r in queue),
      key=lambda r: (extension[r.id] - r.num_tokens, r.arrival),
    )
    deficits, given = self.deficits, collections.Counter()
    ordered, refills = [], []
    while left and len(ordered) < budget.max_requests:
      # Line by line through the queue; a client may run dry on the way.
      rest = []
      for r in left:
        if deficits[r.client] > 0:
          deficits[r.client] -= self._ledger.prompt_cost(extension[r.id])
          ordered.append(r)
          refills.append(dict(given))
        else:
          rest.append(r)
      if left and len(rest) == len(left):
        # As many refills as bring the first of them out of debt.
        owed = {c: int(-d // self._quantum) + 1 for c, d in deficits.items()}
        rounds = min(owed[r.client] for r in left)
        for client, deficit in deficits.items():
          if deficit <= 0:
            count = min(owed[client], rounds)
            deficits[client] += count * self._quantum
            given[client] += count
      left = rest
    return ordered, refills
