"""What an engine counts as it runs."""

import collections
import dataclasses
import time
from typing import NamedTuple

_MAX_STEPS = 100_000  # About 20 MB.


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
    num_steps: Steps dispatched.
    num_computed: Tokens they computed.
    num_padding: Tokens they computed for nothing, to fill a bucket.
    steps: One entry a step, of the last 100,000.
  """

  num_generated: int = 0
  num_finished: int = 0
  num_preemptions: int = 0
  num_swapped: int = 0
  num_failed_steps: int = 0
  num_poisoned: int = 0
  num_steps: int = 0
  num_computed: int = 0
  num_padding: int = 0
  steps: collections.deque[Step] = dataclasses.field(
    default_factory=lambda: collections.deque(maxlen=_MAX_STEPS)
  )
  _wasted_slots: int = 0
  _held_slots: int = 0
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
    """Counts a step, and adds it to the trace."""
    self.num_steps += 1
    self.num_computed += num_tokens
    self.num_padding += bucket - num_tokens
    self._wasted_slots += wasted_slots
    self._held_slots += pages_in_use * page_size
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
    return self._wasted_slots / max(1, self._held_slots)

  @property
  def padding_fraction(self) -> float:
    """Computed tokens that were padding, over all computed."""
    return self.num_padding / max(1, self.num_padding + self.num_computed)
