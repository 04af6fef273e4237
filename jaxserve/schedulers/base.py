"""What every scheduler implements: a pure host function, no JAX.

A scheduler sees requests and a budget and answers with a `Plan`. It knows
nothing of devices, so the same function runs live and in a simulator.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol, runtime_checkable


# Made anew for every request and step: a frozen one takes three times as long.
@dataclasses.dataclass(slots=True, eq=False)
class Request:
  """What a scheduler may see of a request; it changes nothing of it.

  Attributes:
    id: Unique.
    arrival: Order of submission; ties do not occur.
    num_tokens: Prompt plus generated tokens, known or about to be.
    num_computed: How many of them are in the KV cache.
    num_pages: Pages it holds.
    is_running: Whether it holds a row of the batch (and may hold pages).
    prompt: Token ids of the prompt.
    max_tokens: Tokens it may generate.
    priority: Larger runs earlier.
    client: Whose it is, for fair shares.
    arrival_s: When it was submitted, on the clock of `Budget.now_s`.
  """

  id: int
  arrival: int
  num_tokens: int
  num_computed: int = 0
  num_pages: int = 0
  is_running: bool = False
  prompt: Sequence[int] = ()
  max_tokens: int = 1
  priority: int = 0
  client: str = ''
  arrival_s: float = 0.0

  @property
  def num_generated(self) -> int:
    """Tokens past the prompt, known or about to be."""
    return self.num_tokens - len(self.prompt)

  @property
  def remaining(self) -> int:
    """Tokens to compute before the next one can be sampled."""
    return self.num_tokens - self.num_computed

  @property
  def is_decoding(self) -> bool:
    return self.is_running and self.remaining == 1


@dataclasses.dataclass(frozen=True)
class Budget:
  """Limits of one step.

  Attributes:
    max_tokens: Tokens the step may compute.
    max_requests: Rows of the batch.
    free_pages: Pages nobody holds, cached ones that may be evicted included.
    page_size: Tokens of a page.
    now_s: The time, in seconds, on the engine's clock.
    num_cached: Of a waiting request, how many tokens of its prompt are in the
      prefix cache now.
    num_shared: Of these tokens, how many are in pages that a running request
      holds: they take nothing of `free_pages`.
  """

  max_tokens: int
  max_requests: int
  free_pages: int
  page_size: int
  now_s: float = 0.0
  num_cached: Callable[[Request], int] = lambda request: 0
  num_shared: Callable[[Request], int] = lambda request: 0

  def start(self, request: Request) -> int:
    """The first token of a request that has to be computed.

    The last token is computed even if it is cached: it is sampled from.
    """
    if request.is_running or request.num_computed:
      return request.num_computed
    return max(0, min(self.num_cached(request), request.num_tokens - 1))

  def num_new_pages(self, request: Request, num_tokens: int) -> int:
    """Free pages it needs to hold its first `num_tokens` tokens."""
    held = request.num_pages
    if not (request.is_running or request.num_computed):
      held = min(self.num_shared(request), num_tokens) // self.page_size
    return max(0, -(-num_tokens // self.page_size) - held)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to do in the next step.

  Attributes:
    run: Request id -> number of its tokens to compute, at most. A waiting
      request whose prompt is partly cached starts behind what is cached, and a
      request that finds no room after all waits for the next step. (Pages that
      a preempted one shares are not freed: then nobody may find room, and the
      next plan, which sees that, runs somebody.)
    preempt: Requests to stop now; their pages are freed before `run` takes
      new ones. Whether they are computed again or their pages swapped to the
      host is the engine's choice.
  """

  run: dict[int, int]
  preempt: tuple[int, ...] = ()


@runtime_checkable
class Scheduler(Protocol):
  """Maps the live requests, in any order, to a plan."""

  def __call__(self, requests: Sequence[Request], budget: Budget) -> Plan: ...


def admit(
  ordered: Sequence[Request],
  budget: Budget,
  chunk: int,
  *,
  idle: Sequence[Request] = (),
  rank: Callable[[Request], Any] = lambda r: r.arrival,
  expected_pages: Callable[[Request], int] = lambda r: 0,
  displace: bool = False,
) -> Plan:
  """Plans requests in the given order until a limit is reached.

  A running request that lacks pages takes those of running ones of larger rank
  that are not planned yet, the largest first, if that is enough. So the running
  request of smallest rank goes on, at the latest when those planned before it
  have finished or lack a page; and every request that runs finishes, provided
  each alone fits the pool and ranks do not change.

  A waiting request comes in if, after its first chunk, each running one has the
  pages left that it is expected to take, and at least one; else it would soon
  be preempted again. The first that finds no room keeps out those after it:
  large ones would starve behind small ones. A prompt leaves one token of the
  budget to each decode after it.

  Args:
    ordered: Requests to plan.
    budget: Limits of the step.
    chunk: Tokens of one request that the step computes at most.
    idle: Running requests that sit this step out. They keep their rows, and
      their pages unless these are taken.
    rank: The smaller, the longer a request keeps its pages. No ties.
    expected_pages: Pages a request is expected to hold in the end.
    displace: Whether a waiting request, too, takes rows and pages of running
      ones of larger rank.
  """
  run: dict[int, int] = {}
  preempt: list[Request] = []
  running = {r.id: r for r in (*ordered, *idle) if r.is_running}
  # What they will take matters to those who wait alone.
  has_waiting = not all(r.is_running for r in ordered)
  to_come = lambda r: max(expected_pages(r) - r.num_pages, 1)
  more = {i: to_come(r) for i, r in running.items()} if has_waiting else {}
  decoding = {r.id for r in ordered if r.is_decoding}
  num_decoding = len(decoding)
  tokens, free, is_full = budget.max_tokens, budget.free_pages, False
  for r in ordered:
    if tokens < 1:
      break
    num_decoding -= r.id in decoding
    if r in preempt or (is_full and not r.is_running):
      continue
    left = tokens if r.id in decoding else max(tokens - num_decoding, 1)
    count, need = _demand(r, budget, min(chunk, left))
    if count < 1:
      continue
    pages, rows = need - free, 0
    if not r.is_running:
      # Who was just preempted comes before anybody who ranks after it.
      is_full = any(not displace or rank(v) < rank(r) for v in preempt)
      rows = len(running) + 1 - budget.max_requests
      if running:
        pages += max(expected_pages(r) - need, 0) + sum(more.values())
    freed = []
    if pages > 0 or rows > 0:
      may_take = [
        v
        for v in sorted(running.values(), key=rank)
        if v.id not in run and rank(v) > rank(r) and (r.is_running or displace)
      ]
      freed = _enough(may_take, pages, rows, {} if r.is_running else more)
    if freed is None or (is_full and not r.is_running):
      is_full = is_full or not r.is_running
      continue
    for v in freed:
      del running[v.id]
      more.pop(v.id, None)
      free += v.num_pages
    preempt += freed
    running[r.id] = r
    if has_waiting:
      more[r.id] = max(to_come(r) - need, 1)
    run[r.id] = count
    tokens -= count
    free -= need
  return Plan(run, tuple(r.id for r in preempt))


def _demand(request, budget, most):
  """Tokens to compute of it, at most `most`, and the free pages they need."""
  if request.is_decoding:
    pages = -(-request.num_tokens // budget.page_size)
    return 1, max(0, pages - request.num_pages)
  start = budget.start(request)
  count = min(request.num_tokens - start, most)
  return count, budget.num_new_pages(request, start + count)


def _enough(victims, pages, rows, more):
  """The last of `victims` that make up for lacking pages and rows, if any."""
  taken = []
  while pages > 0 or rows > 0:
    if not victims:
      return None
    victim = victims.pop()
    taken.append(victim)
    pages -= victim.num_pages + more.get(victim.id, 0)
    rows -= 1
  return taken
