"""How long decodes wait while a prompt of 8k tokens is prefilled.

Short requests arrive as a Poisson process; a long prompt comes every few
seconds. Counted is each time between two tokens of a short request that
overlaps the time from a long prompt's arrival to its first token. Prefill in
chunks beside the decodes (Sarathi-Serve) against whole prompts first come,
first served (as Orca), on our engine.
"""

import random
import statistics
from typing import Any

import numpy as np

from experiments.benchmarks.peers import protocol
from experiments.benchmarks.serving_arrivals import Arrival
from experiments.benchmarks.serving_arrivals import play
from experiments.benchmarks.serving_arrivals import poisson
from experiments.benchmarks.serving_processes import run_once
from experiments.benchmarks.serving_settings import Settings
from experiments.benchmarks.serving_settings import emit
from jaxserve import LLM
from jaxserve import EngineConfig

_LONG = 8192
_ROWS = 16
_CHUNK = 128
_NUM_SHORT = 32
_RATE = 1.0
_POLICIES = {
  'whole': dict(
    scheduler='fcfs',
    max_step_tokens=_LONG,
    # Short prompts must not pay for the long one's program.
    token_buckets=(_ROWS, _CHUNK, 8 * _CHUNK, _LONG),
  ),
  'chunked': dict(
    scheduler='chunked_prefill',
    scheduler_kwargs=dict(chunk=_CHUNK, token_budget=_CHUNK),
    max_step_tokens=_CHUNK,
    token_buckets=(_ROWS, _CHUNK),
  ),
}


def stalls(settings: Settings) -> dict[str, Any]:
  """Both policies, in turns."""
  short = settings.requests is not None
  results = {name: [] for name in _POLICIES}
  for i in range(1 if short else settings.rounds):
    for name, policy in _POLICIES.items():
      job = settings.job(
        'qwen3-27m',
        policy=policy,
        num_short=settings.count(_NUM_SHORT),
        num_long=1 if short else 2,
        seed=i,
      )
      result = run_once('serving_stalls', job, settings.programs)
      emit(scenario='stalls', policy=name, round=i, **result)
      results[name].append(result)
  median = {
    name: {k: round(statistics.median(r[k] for r in rs), 4) for k in rs[0]}
    for name, rs in results.items()
  }
  ratio = median['whole']['p99_s'] / median['chunked']['p99_s']
  return dict(policies=median, p99_ratio=round(ratio, 2))


def measure(job: dict[str, Any]) -> dict[str, Any]:
  """One policy, in this process."""
  with LLM(
    job['model'],
    engine=EngineConfig(
      max_num_requests=_ROWS,
      max_seq_len=_LONG + 64,
      page_size=32,
      num_pages=1024,
      prefix_cache=False,
      **(job['engine'] | job['policy']),
    ),
  ) as llm:
    traces = play(llm.engine, _arrivals(job))
  long = [t for t in traces if len(t.arrival.prompt) == _LONG]
  spans = [(t.arrival.at_s, t.tokens_s[0]) for t in long]
  gaps, all_gaps = [], []
  for t in traces:
    if t in long:
      continue
    for start, end in zip(t.tokens_s, t.tokens_s[1:], strict=False):
      all_gaps.append(end - start)
      if any(start < stop and end > begin for begin, stop in spans):
        gaps.append(end - start)
  return dict(
    p99_s=float(np.percentile(gaps, 99)),
    p50_s=float(np.percentile(gaps, 50)),
    longest_s=max(gaps),
    p99_of_all_s=float(np.percentile(all_gaps, 99)),
    num_gaps=len(gaps),
    long_first_token_s=statistics.mean(t.first_token_s for t in long),
    tokens_per_s=sum(len(t.tokens_s) for t in traces)
    / max(t.tokens_s[-1] for t in traces),
  )


def _arrivals(job):
  rng = random.Random(job['seed'])
  draw = lambda n: [rng.randrange(4, 4096) for _ in range(n)]
  times = poisson(_RATE, job['num_short'], rng)
  short = [Arrival(t, draw(rng.randint(16, 128)), 64) for t in times]
  # Spread over the run, once requests are decoding.
  long = [
    Arrival(times[-1] * (i + 0.5) / job['num_long'], draw(_LONG), 4)
    for i in range(job['num_long'])
  ]
  return short + long


if __name__ == '__main__':
  protocol.once(measure)
