"""Goodput under an SLO, scheduler by scheduler, on the real engine.

Zhong et al., "DistServe", https://arxiv.org/abs/2401.09670, section 2: requests
a second whose time to first token and time per token are both within bounds.
The model is tiny, so that a CPU core serves thousands of steps; bounds are
multiples of what an idle engine takes, and rates fractions of its capacity.
Lengths are log-normal; four clients, of which one sends half of all requests,
have a system prompt each; a tenth of the requests has priority.
"""

import random
import statistics
from typing import Any

from matplotlib import pyplot

from experiments.benchmarks.peers import protocol
from experiments.benchmarks.serving_arrivals import Arrival
from experiments.benchmarks.serving_arrivals import play
from experiments.benchmarks.serving_arrivals import poisson
from experiments.benchmarks.serving_processes import run_once
from experiments.benchmarks.serving_settings import Settings
from experiments.benchmarks.serving_settings import emit
from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxserve import schedulers

_COUNT = 96
_LOADS = (0.5, 0.75, 1.0, 1.25)
_FIRST_TOKEN_FACTOR = 10
_PER_TOKEN_FACTOR = 8
_SYSTEM_LEN = 48
_MAX_LEN = 768


def goodput(settings: Settings) -> dict[str, Any]:
  """Every scheduler at every load."""
  count = settings.count(_COUNT)

  def run(**more):
    job = settings.job('qwen3-tiny', count=count, **more)
    return run_once('serving_goodput', job, settings.programs)

  idle = run(scheduler='chunked_prefill', calibrate=True)
  slo = dict(
    first_token_s=_FIRST_TOKEN_FACTOR * idle['first_token_s'],
    per_token_s=_PER_TOKEN_FACTOR * idle['per_token_s'],
  )
  rates = [load * idle['requests_per_s'] for load in _LOADS]
  emit(scenario='goodput', idle=idle, slo=slo)
  # In turns, so that what else the machine does meets all of them.
  results = {name: [] for name in schedulers.names()}
  for i in range(settings.rounds):
    for name, rounds in results.items():
      result = run(scheduler=name, calibrate=False, slo=slo, rates=rates)
      rounds.append(result['loads'])
      emit(scenario='goodput', scheduler=name, round=i, **result)
  table = {name: _medians(rounds) for name, rounds in results.items()}
  settings.pictures.mkdir(parents=True, exist_ok=True)
  _draw(table, settings.pictures / 'serving_goodput.png')
  return dict(
    capacity_requests_per_s=idle['requests_per_s'],
    slo=slo,
    loads=_LOADS,
    rounds=settings.rounds,
    schedulers=table,
  )


def _medians(rounds):
  """Of each figure at each load."""
  return [
    {key: round(statistics.median(x[key] for x in same), 4) for key in same[0]}
    for same in zip(*rounds, strict=True)
  ]


def measure(job: dict[str, Any]) -> dict[str, Any]:
  """One scheduler, in this process; or what an idle engine takes."""
  with LLM(
    job['model'],
    engine=EngineConfig(
      max_num_requests=32,
      max_seq_len=_MAX_LEN,
      page_size=16,
      max_step_tokens=256,
      scheduler=job['scheduler'],
      **job['engine'],
    ),
  ) as llm:
    # Programs have run once before anything counts.
    llm.generate([[5] * 300], SamplingParams(max_tokens=8), show_progress=False)
    if job['calibrate']:
      return _calibrate(llm.engine, job['count'])
    return dict(
      loads=[
        _attained(
          play(llm.engine, _arrivals(rate, job['count'], seed=1 + i)),
          job['slo'],
        )
        for i, rate in enumerate(job['rates'])
      ]
    )


def _calibrate(engine, count):
  """Times of requests that come one by one, and of all at once."""
  alone = play(engine, _arrivals(1e-3, min(count, 24), seed=0))
  at_once = play(engine, _arrivals(1e6, count, seed=0))
  return dict(
    first_token_s=statistics.median(t.first_token_s for t in alone),
    per_token_s=statistics.median(t.time_per_token_s for t in alone),
    requests_per_s=count / max(t.tokens_s[-1] for t in at_once),
  )


def _arrivals(rate, count, seed):
  # Clients, prompts and lengths are those of the seed, whatever the rate.
  rng = random.Random(seed)
  draw = lambda n: [rng.randrange(4, 512) for _ in range(n)]
  systems = [draw(_SYSTEM_LEN) for _ in range(4)]
  times = poisson(1.0, count, random.Random(seed))
  arrivals = []
  for time_s in times:
    client = rng.choice((0, 0, 0, 1, 2, 3))
    own = min(512, max(4, round(rng.lognormvariate(4.2, 0.9))))
    new = min(128, max(4, round(rng.lognormvariate(3.2, 0.7))))
    priority = int(rng.random() < 0.1)
    arrivals.append(
      Arrival(
        time_s / rate,
        systems[client] + draw(own),
        new,
        client=f'client {client}',
        priority=priority,
      )
    )
  return arrivals


def _attained(traces, slo):
  good = [
    t
    for t in traces
    if t.first_token_s <= slo['first_token_s']
    and t.time_per_token_s <= slo['per_token_s']
  ]
  share = lambda name: (
    sum(t.arrival.client == name for t in good)
    / max(1, sum(t.arrival.client == name for t in traces))
  )
  first = sorted(t.first_token_s for t in traces)
  per_token = sorted(t.time_per_token_s for t in traces)
  p99 = lambda x: round(x[int(0.99 * (len(x) - 1))], 4)
  return dict(
    goodput_requests_per_s=round(
      len(good) / max(t.tokens_s[-1] for t in traces), 3
    ),
    attained=round(len(good) / len(traces), 3),
    worst_client_attained=round(min(share(f'client {i}') for i in range(4)), 3),
    median_first_token_s=round(statistics.median(first), 4),
    p99_first_token_s=p99(first),
    p99_per_token_s=p99(per_token),
  )


def _draw(table, path):
  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout='constrained')
  for i, (name, loads) in enumerate(table.items()):
    goodputs = [x['goodput_requests_per_s'] for x in loads]
    axes.plot(_LOADS, goodputs, marker='osv^D'[i % 5], label=name)
  axes.set_xlabel('offered load, as a fraction of capacity')
  axes.set_ylabel('requests/s within the SLO')
  axes.set_title('Goodput by scheduler')
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


if __name__ == '__main__':
  protocol.once(measure)
