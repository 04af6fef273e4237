"""What a schedule was worth."""

from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

from jaxserve.simulate.simulator import Result
from jaxserve.simulate.simulator import Served


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a request may take: to its first token, and between two tokens."""

  first_token_s: float = 1.0
  between_tokens_s: float = 0.1


@dataclasses.dataclass(frozen=True)
class Summary:
  """Figures of a run, times in seconds.

  Attributes:
    tokens_per_s: Generated tokens over the whole time.
    first_token_p50_s: From arrival to the first token (TTFT).
    first_token_p99_s: The same.
    between_tokens_p50_s: Between consecutive tokens of a request (TBT).
    between_tokens_p99_s: The same.
    between_tokens_max_s: The longest stall.
    latency_mean_s: From arrival to the last token.
    latency_p99_s: The same.
    goodput: Requests per second that met the objective: their first token in
      time, and 99% of the others.
    prefilled_fraction: Prompt tokens computed, over those there were: below 1
      what was reused, above 1 what was computed again.
    step_tokens_mean: Tokens of a step.
    padding_fraction: Of the tokens that steps computed, what was padding.
    num_preemptions: Requests that lost their pages.
    service_gap: See `service_gap`.
    service_gap_computed: The same, if cached tokens of a prompt are no service.
  """

  tokens_per_s: float
  first_token_p50_s: float
  first_token_p99_s: float
  between_tokens_p50_s: float
  between_tokens_p99_s: float
  between_tokens_max_s: float
  latency_mean_s: float
  latency_p99_s: float
  goodput: float
  prefilled_fraction: float
  step_tokens_mean: float
  padding_fraction: float
  num_preemptions: int
  service_gap: float
  service_gap_computed: float


def summary(result: Result, objective: Objective = Objective()) -> Summary:
  """Judges a run."""
  served, steps = result.served, result.steps
  first = [s.token_s[0] - s.arrival.time_s for s in served]
  latency = [s.token_s[-1] - s.arrival.time_s for s in served]
  gaps = np.concatenate([np.diff(s.token_s) for s in served])
  gaps = gaps if gaps.size else np.zeros(1)
  wall = steps[-1].end_s - min(s.arrival.time_s for s in served)
  prompt_tokens = sum(len(s.arrival.prompt) for s in served)
  return Summary(
    tokens_per_s=sum(len(s.token_s) for s in served) / wall,
    first_token_p50_s=float(np.percentile(first, 50)),
    first_token_p99_s=float(np.percentile(first, 99)),
    between_tokens_p50_s=float(np.percentile(gaps, 50)),
    between_tokens_p99_s=float(np.percentile(gaps, 99)),
    between_tokens_max_s=float(gaps.max()),
    latency_mean_s=float(np.mean(latency)),
    latency_p99_s=float(np.percentile(latency, 99)),
    goodput=float(sum(_is_good(s, objective) for s in served) / wall),
    prefilled_fraction=sum(s.num_prefilled for s in served) / prompt_tokens,
    step_tokens_mean=float(np.mean([s.num_tokens for s in steps])),
    padding_fraction=1
    - sum(s.num_tokens for s in steps) / sum(s.bucket for s in steps),
    num_preemptions=sum(s.num_preemptions for s in served),
    service_gap=service_gap(result),
    service_gap_computed=service_gap(result, cached_weight=0.0),
  )


def _is_good(served: Served, objective: Objective) -> bool:
  first = served.token_s[0] - served.arrival.time_s
  gaps = np.diff(served.token_s)
  late = np.mean(gaps > objective.between_tokens_s) if gaps.size else 0.0
  return first <= objective.first_token_s and late <= 0.01


def service(
  result: Result,
  prompt_weight: float = 1.0,
  generated_weight: float = 2.0,
  cached_weight: float | None = None,
) -> tuple[list[str], np.ndarray]:
  """Clients, and what each has been served by the end of every step.

  As Sheng et al. count it (https://arxiv.org/abs/2401.00588): a prompt when it
  enters, a generated token when it is known. Cached tokens of a prompt count
  like the others unless `cached_weight` is given.
  """
  if cached_weight is None:
    cached_weight = prompt_weight
  ends = np.array([s.end_s for s in result.steps])
  clients = sorted({s.arrival.client for s in result.served})
  given = np.zeros((len(clients), len(ends)))
  for s in result.served:
    row = given[clients.index(s.arrival.client)]
    entered = np.searchsorted(ends, s.enter_s, side='right')
    row[entered] += cached_weight * s.num_cached
    row[entered] += prompt_weight * (len(s.arrival.prompt) - s.num_cached)
    np.add.at(row, np.searchsorted(ends, s.token_s), generated_weight)
  return clients, np.cumsum(given, axis=1)


def service_gap(result: Result, **weights: float) -> float:
  """Largest difference of service between two clients that both had to wait.

  The maximum over pairs of clients and over intervals in which each of the two
  always had a request waiting, of the difference of what they were served.
  """
  clients, total = service(result, **weights)
  waits = np.array(
    [[c in s.waiting for s in result.steps] for c in clients], bool
  )
  worst = 0.0
  for i, j in itertools.combinations(range(len(clients)), 2):
    both = waits[i] & waits[j]
    for interval in _runs(both):
      difference = (total[i] - total[j])[interval]
      worst = max(worst, float(difference.max() - difference.min()))
  return worst


def _runs(flags: Sequence[bool]) -> list[slice]:
  """Slices over which `flags` stays true."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
  return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
