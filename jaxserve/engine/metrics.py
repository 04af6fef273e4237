"""What an engine counts as it runs."""

import dataclasses
import time
from typing import NamedTuple


class Step(NamedTuple):
  """One dispatched step.

  Attributes:
    time_s: Seconds since the engine started.
    num_tokens: Tokens computed.
    bucket: Tokens the program was compiled for.
    num_running: Requests that hold a row.
    num_waiting: Requests that do not.
    pages_in_use: Pages held.
    cached_tokens: Tokens in these pages.
    wasted_slots: Slots of held pages without a token.
  """

  time_s: float
  num_tokens: int
  bucket: int
  num_running: int
  num_waiting: int
  pages_in_use: int
  cached_tokens: int
  wasted_slots: int


@dataclasses.dataclass
class Metrics:
  """Counters and the trace of steps.

  Attributes:
    num_generated: Tokens sampled and kept.
    num_finished: Requests that ended.
    num_preemptions: Times one was stopped for want of pages.
    num_swapped: How many of these went to the host.
    num_failed_steps: Steps that raised.
    num_poisoned: Continuations ended for logits that were not finite.
    steps: One entry a step.
  """

  num_generated: int = 0
  num_finished: int = 0
  num_preemptions: int = 0
  num_swapped: int = 0
  num_failed_steps: int = 0
  num_poisoned: int = 0
  steps: list[Step] = dataclasses.field(default_factory=list)
  _start_s: float = dataclasses.field(default_factory=time.perf_counter)

  def record_step(
    self,
    *,
    num_tokens: int,
    bucket: int,
    num_running: int,
    num_waiting: int,
    pages_in_use: int,
    wasted_slots: int,
    page_size: int,
  ) -> None:
    """Adds a step to the trace."""
    self.steps.append(
      Step(
        time.perf_counter() - self._start_s,
        num_tokens,
        bucket,
        num_running,
        num_waiting,
        pages_in_use,
        pages_in_use * page_size - wasted_slots,
        wasted_slots,
      )
    )

  @property
  def wasted_slots_fraction(self) -> float:
    """KV slots held without a token, over those held, summed over steps."""
    wasted = sum(s.wasted_slots for s in self.steps)
    held = wasted + sum(s.cached_tokens for s in self.steps)
    return wasted / held if held else 0.0

  @property
  def padding_fraction(self) -> float:
    """Computed tokens that were padding, over all computed."""
    total = sum(s.bucket for s in self.steps)
    return 1 - sum(s.num_tokens for s in self.steps) / total if total else 0.0
