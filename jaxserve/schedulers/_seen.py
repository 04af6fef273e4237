"""What a scheduler with a memory keeps of requests from call to call.

Schedulers are shown the live requests before each step and nothing else. A
request may be missing for a step or two (its next token depends on one that has
not been read), so it has left only after a while.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

from jaxserve.schedulers import base

_PATIENCE = 8  # Calls.


class Seen:
  """A record per request, from when it is first shown until it has left.

  Args:
    make: Makes the record of a new request.
  """

  def __init__(self, make: Callable[[base.Request], Any]):
    self._make = make
    self._entries: dict[int, list] = {}
    self._call = 0

  def __getitem__(self, request_id: int) -> Any:
    return self._entries[request_id][0]

  def update(
    self, requests: Iterable[base.Request]
  ) -> tuple[list[base.Request], list[Any]]:
    """Takes note of who is there.

    Returns:
      The new requests by arrival, and the records of those that have left.
    """
    self._call += 1
    new = []
    for r in requests:
      if (entry := self._entries.get(r.id)) is not None:
        entry[1] = self._call
      else:
        new.append(r)
    new.sort(key=lambda r: r.arrival)
    for r in new:
      self._entries[r.id] = [self._make(r), self._call]
    left = []
    if self._call % _PATIENCE == 0:
      oldest = self._call - _PATIENCE
      left = [i for i, (_, call) in self._entries.items() if call < oldest]
    return new, [self._entries.pop(i)[0] for i in left]


@dataclasses.dataclass
class _Bill:
  client: str
  prompt: float = 0.0
  num_generated: int = 0
  has_run: bool = False


class Ledger:
  """Service of each client: weighted prompt and generated tokens.

  A plan is charged at once, as the papers do, and set right when the requests
  are seen again: one that found no room after all has had nothing.

  Args:
    prompt_weight: Cost of a prompt token.
    generated_weight: Cost of a generated token.
  """

  def __init__(self, prompt_weight: float, generated_weight: float):
    self._prompt_weight = prompt_weight
    self._generated_weight = generated_weight
    self._bills = Seen(lambda r: _Bill(r.client, num_generated=r.num_generated))
    self.service: dict[str, float] = {}

  def settle(self, requests: Sequence[base.Request]) -> list[base.Request]:
    """Corrects the charges by what is seen; returns the new requests."""
    new, _ = self._bills.update(requests)
    for r in requests:
      bill = self._bills[r.id]
      self._charge_generated(bill, r.num_generated)
      bill.has_run |= r.is_running
      if bill.prompt and not bill.has_run:
        self._add(bill.client, -bill.prompt)
        bill.prompt = 0.0
    return new

  def prompt_cost(self, num_tokens: int) -> float:
    """What so many tokens of a prompt are charged."""
    return self._prompt_weight * num_tokens

  def charge(
    self,
    requests: Sequence[base.Request],
    plan: base.Plan,
    budget: base.Budget,
    num_prompt_tokens: Callable[[base.Request], int],
  ) -> None:
    """Charges a plan: prompts on entering, and the tokens it will sample."""
    for r in requests:
      if r.id not in plan.run:
        continue
      bill = self._bills[r.id]
      if not bill.prompt and not bill.has_run and not r.num_generated:
        bill.prompt = self.prompt_cost(num_prompt_tokens(r))
        self._add(bill.client, bill.prompt)
      if plan.run[r.id] == r.num_tokens - budget.start(r):
        self._charge_generated(bill, r.num_generated + 1)

  def _charge_generated(self, bill, num_generated):
    if more := num_generated - bill.num_generated:
      self._add(bill.client, self._generated_weight * more)
      bill.num_generated = num_generated

  def _add(self, client, cost):
    self.service[client] = self.service.get(client, 0.0) + cost
