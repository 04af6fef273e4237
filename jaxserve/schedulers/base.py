"""What every scheduler implements: a pure host function, no JAX.

A scheduler sees requests and a budget and answers with a `Plan`. It knows
nothing of devices, so the same function runs live and in a simulator.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Request:
  """What a scheduler may see of a request.

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
  """

  max_tokens: int
  max_requests: int
  free_pages: int
  page_size: int
  now_s: float = 0.0
  num_cached: Callable[[Request], int] = lambda request: 0


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to do in the next step.

  Attributes:
    run: Request id -> number of its tokens to compute, at most. A waiting
      request whose prompt is partly cached starts behind what is cached, and a
      request that finds no room after all waits for the next step.
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


def admit(ordered: Sequence[Request], budget: Budget, chunk: int) -> Plan:
  """Plans requests in the given order until a limit is reached.

  A running request that lacks a page takes those of the newest running request
  not yet planned, if that one is newer than itself. So the first running
  request of `ordered` can always go on, and every request finishes, provided
  each alone fits the pool. A waiting request comes in only if, after its first
  chunk, one page is left for each running one; else it would soon be preempted
  again.
  """
  run: dict[int, int] = {}
  preempt: list[int] = []
  tokens, free = budget.max_tokens, budget.free_pages
  victims = sorted(
    (r for r in ordered if r.is_running), key=lambda r: r.arrival
  )
  num_running = len(victims)
  for r in ordered:
    count = min(r.remaining, chunk, tokens)
    if r.id in preempt or count < 1:
      continue
    need = -(-(r.num_computed + count) // budget.page_size) - r.num_pages
    if r.is_running:
      while need > free and victims and victims[-1].arrival > r.arrival:
        victim = victims.pop()
        if victim.id not in run:
          preempt.append(victim.id)
          free += victim.num_pages
          num_running -= 1
    elif (
      preempt or num_running == budget.max_requests or need + num_running > free
    ):
      continue
    else:
      num_running += 1
    if need > free:
      continue
    run[r.id] = count
    tokens -= count
    free -= max(need, 0)
  return Plan(run, tuple(preempt))
