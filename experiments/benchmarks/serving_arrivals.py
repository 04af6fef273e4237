"""Plays timed arrivals to an engine, on the clock of this process's CPU.

With one engine on one core, CPU time is the wall time of an idle machine: other
work on the machine does not change it. Idle time is skipped. A request counts
from when it was to arrive, whether or not a step was then under way.
"""

from collections.abc import Sequence
import dataclasses
import random
import time

from jaxserve import SamplingParams
from jaxserve.engine.engine import Engine


@dataclasses.dataclass(frozen=True)
class Arrival:
  """A request to come, `at_s` on the clock."""

  at_s: float
  prompt: Sequence[int]
  max_tokens: int
  client: str = ''
  priority: int = 0


@dataclasses.dataclass
class Trace:
  """When the tokens of a request came."""

  arrival: Arrival
  tokens_s: list[float] = dataclasses.field(default_factory=list)

  @property
  def first_token_s(self) -> float:
    """From arrival to the first token."""
    return self.tokens_s[0] - self.arrival.at_s

  @property
  def time_per_token_s(self) -> float:
    """Mean time between its tokens."""
    between = len(self.tokens_s) - 1
    return (self.tokens_s[-1] - self.tokens_s[0]) / max(between, 1)


class CpuClock:
  """CPU seconds of this process, plus what was skipped."""

  def __init__(self):
    self._start = time.process_time()

  def now(self) -> float:
    return time.process_time() - self._start

  def skip_to(self, time_s: float) -> None:
    """Lets idle time pass."""
    self._start -= max(0.0, time_s - self.now())


def poisson(rate: float, count: int, rng: random.Random) -> list[float]:
  """Times of `count` arrivals, `rate` a second."""
  now, times = 0.0, []
  for _ in range(count):
    now += rng.expovariate(rate)
    times.append(now)
  return times


def play(engine: Engine, arrivals: Sequence[Arrival]) -> list[Trace]:
  """Runs all arrivals to their ends; traces are in order of arrival."""
  clock = CpuClock()
  waiting = sorted(arrivals, key=lambda a: a.at_s)
  traces = [Trace(a) for a in waiting]
  added = 0

  def sink_of(trace):
    def sink(delta):
      trace.tokens_s += [clock.now()] * len(delta.token_ids)

    return sink

  while added < len(traces) or engine.num_unfinished:
    while added < len(traces) and waiting[added].at_s <= clock.now():
      a, trace = waiting[added], traces[added]
      engine.add_request(
        a.prompt,
        SamplingParams(max_tokens=a.max_tokens, temperature=0, ignore_eos=True),
        priority=a.priority,
        client=a.client,
        sink=sink_of(trace),
      )
      added += 1
    if engine.num_unfinished:
      engine.step()
    else:
      clock.skip_to(waiting[added].at_s)
  return traces
