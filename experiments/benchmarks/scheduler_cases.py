"""Traces on which a scheduler's paper claims an effect.

The machine is `ACCELERATOR_7B`: costs computed from published rates of a chip,
not measured. `scale` multiplies the number of requests.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from jaxserve import schedulers
from jaxserve.schedulers import base
from jaxserve.simulate import trace
from jaxserve.simulate.cost import ACCELERATOR_7B
from jaxserve.simulate.metrics import Objective
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import Served

Contender = Callable[[], base.Scheduler]


@dataclasses.dataclass(frozen=True)
class Case:
  """A trace, the machine it runs on, and who runs it.

  Attributes:
    about: What it is, and which figure to look at.
    arrivals: The trace.
    machine: The machine.
    contenders: Label -> scheduler.
    figures: Fields of `Summary` to print, the one drawn first.
    objective: For goodput.
    counts: Which requests the figures are about.
  """

  about: str
  arrivals: Sequence[Arrival]
  machine: Machine
  contenders: dict[str, Contender]
  figures: Sequence[str]
  objective: Objective = Objective()
  counts: Callable[[Served], bool] = lambda served: True


def _named(*names, **kwargs):
  return {n: lambda n=n: schedulers.get(n)(**kwargs) for n in names}


def _labelled(label, name, **kwargs):
  return {label: lambda: schedulers.get(name)(**kwargs)}


class _Truth:
  """Knows what each prompt will generate, and is wrong by a given spread."""

  def __init__(self, arrivals: Sequence[Arrival], spread: float = 0.0):
    rng = np.random.default_rng(0)
    error = np.exp(spread * rng.standard_normal(len(arrivals)))
    self._lengths = {
      a.prompt: a.num_generated * e
      for a, e in zip(arrivals, error, strict=True)
    }

  def __call__(self, prompt, max_tokens):
    return min(self._lengths[tuple(prompt)], max_tokens)

  def observe(self, prompt, num_generated):
    """Nothing to learn."""


def stalls(scale: float) -> Case:
  """Chats, and now and then a prompt of 8192 tokens."""
  chats = trace.poisson(
    4.0, int(240 * scale), lengths=trace.Lengths(161, 200, 0.7), seed=1
  )
  long = trace.Lengths(8192, 64, 0.0, longest=8192)
  prompts = trace.poisson(1.0, int(60 * scale), lengths=long, seed=2)
  chunks = dict(chunk=512, token_budget=512)
  return Case(
    'chats at 4/s and prompts of 8192 tokens at 1/s: how long are chats '
    'stalled? (Sarathi-Serve, FastGen)',
    chats + prompts,
    Machine(ACCELERATOR_7B, max_tokens=8192, max_requests=64, num_pages=8192),
    {
      **_named('fcfs'),
      **_labelled('chunked, no budget', 'chunked_prefill', chunk=8192),
      **_labelled('chunked, budget 512', 'chunked_prefill', **chunks),
      **_labelled('split_fuse 512', 'split_fuse', token_budget=512),
    },
    (
      'between_tokens_p99_s',
      'between_tokens_max_s',
      'first_token_p99_s',
      'tokens_per_s',
      'goodput',
    ),
    Objective(first_token_s=2.0, between_tokens_s=0.1),
    counts=lambda s: len(s.arrival.prompt) < 8192,
  )


def chat(scale: float) -> Case:
  """More chats than the machine can take for a while; every scheduler."""
  arrivals = trace.poisson(
    24.0,
    int(500 * scale),
    lengths=trace.Lengths(correlation=0.3, longest=1024),
    max_tokens=1024,
    seed=3,
  )
  shortest = lambda label, predictor, patience=10**4: _labelled(
    f'shortest, {label}',
    'shortest_first',
    predictor=predictor,
    patience=patience,
  )
  rest = [n for n in schedulers.names() if n != 'shortest_first']
  return Case(
    'chats at 24/s, above what is served: mean latency (learning to rank, S3)',
    arrivals,
    Machine(ACCELERATOR_7B, max_tokens=512, max_requests=64, num_pages=4096),
    {
      **_named(*rest),
      **shortest('known', _Truth(arrivals)),
      **shortest('256 steps', _Truth(arrivals), 256),
      **shortest('known up to x2', _Truth(arrivals, spread=0.7)),
      **shortest('history', 'history'),
      **shortest('max_tokens', 'oracle'),
    },
    (
      'latency_mean_s',
      'latency_p99_s',
      'first_token_p50_s',
      'first_token_p99_s',
      'between_tokens_p99_s',
      'tokens_per_s',
      'goodput',
      'num_preemptions',
    ),
    Objective(first_token_s=5.0, between_tokens_s=0.1),
  )


def clients(scale: float) -> Case:
  """A client that sends three times as much as another."""
  lengths = trace.Lengths(161, 128, 0.7, longest=1024)
  heavy = trace.poisson(
    60.0, int(450 * scale), lengths=lengths, client='heavy', seed=4
  )
  light = trace.poisson(
    20.0, int(150 * scale), lengths=lengths, client='light', seed=5
  )
  return Case(
    'two clients, 60/s and 20/s, above what is served: difference of service '
    'while both wait (VTC)',
    heavy + light,
    Machine(ACCELERATOR_7B, max_tokens=512, max_requests=32, num_pages=4096),
    _named('fcfs', 'chunked_prefill', 'shortest_first', 'vtc', 'dlpm'),
    ('service_gap', 'tokens_per_s', 'first_token_p50_s', 'first_token_p99_s'),
  )


def documents(scale: float) -> Case:
  """Offline: shuffled questions, and a cache for a third of the documents."""
  arrivals = trace.documents(
    48, max(2, int(16 * scale)), document_len=2000, generated=(8, 96), seed=6
  )
  return Case(
    '16 questions about each of 48 documents, offline, shuffled; the cache '
    'holds 16 documents: prompt tokens computed (BatchLLM)',
    arrivals,
    Machine(ACCELERATOR_7B, max_tokens=512, max_requests=64, num_pages=2048),
    {
      **_named('fcfs', 'chunked_prefill', 'prefix_grouped'),
      **_labelled('dlpm, large quantum', 'dlpm', quantum=10**9, window=10**6),
    },
    ('tokens_per_s', 'prefilled_fraction', 'step_tokens_mean'),
  )


def in_order(scale: float) -> Case:
  """The same questions, document by document."""
  case = documents(scale)
  return dataclasses.replace(
    case,
    about='the same, document by document: what is left to group?',
    arrivals=sorted(case.arrivals, key=lambda a: a.prompt),
  )


def shared(scale: float) -> Case:
  """Two clients who ask about documents of their own."""
  arrivals = []
  rng = np.random.default_rng(7)
  for client, seed in (('one', 8), ('two', 9)):
    asked = trace.documents(
      24,
      max(2, int(12 * scale)),
      document_len=2000,
      generated=(16, 64),
      seed=seed,
    )
    times = np.cumsum(rng.exponential(1 / 40, len(asked)))
    arrivals += [
      dataclasses.replace(a, time_s=float(t), client=client)
      for a, t in zip(asked, times, strict=True)
    ]
  quanta = {
    f'dlpm {q}': lambda q=q: schedulers.get('dlpm')(quantum=q)
    for q in (100, 10_000, 100_000)
  }
  return Case(
    'two clients, 24 documents each, above what is served: reuse and fairness '
    '(DLPM)',
    arrivals,
    Machine(ACCELERATOR_7B, max_tokens=512, max_requests=32, num_pages=2048),
    {**_named('fcfs', 'vtc', 'prefix_grouped'), **quanta},
    (
      'tokens_per_s',
      'prefilled_fraction',
      'service_gap',
      'service_gap_computed',
    ),
  )


def priorities(scale: float) -> Case:
  """One request in ten is urgent, on a machine that is full."""
  lengths = trace.Lengths(longest=1024)
  count = int(60 * scale)
  arrivals = trace.poisson(14.0, 9 * count, lengths=lengths, seed=10)
  urgent = trace.poisson(1.5, count, lengths=lengths, priority=5, seed=11)
  return Case(
    'chats at 14/s, a tenth of them urgent; figures of these',
    arrivals + urgent,
    Machine(ACCELERATOR_7B, max_tokens=512, max_requests=64, num_pages=4096),
    _named('fcfs', 'chunked_prefill', 'priority_aging'),
    ('first_token_p99_s', 'latency_mean_s', 'num_preemptions'),
    counts=lambda s: s.arrival.priority > 0,
  )


def packing(scale: float) -> Case:
  """Prompts alone, one token each: are steps full?"""
  lengths = trace.Lengths(200, 1, 1.0, longest=2048)
  arrivals = [
    dataclasses.replace(a, time_s=0.0, num_generated=1)
    for a in trace.poisson(1.0, int(800 * scale), lengths=lengths, seed=12)
  ]
  return Case(
    'prompts of 200 tokens on average, one token each, steps padded to 64, 512 '
    'or 2048 tokens (Prepacking)',
    arrivals,
    Machine(
      ACCELERATOR_7B,
      2048,
      max_requests=64,
      num_pages=8192,
      buckets=(64, 512, 2048),
    ),
    {
      **_named('fcfs', 'prepacking'),
      **_labelled('chunked, 2048', 'chunked_prefill', chunk=2048),
    },
    ('padding_fraction', 'tokens_per_s', 'first_token_p50_s'),
  )


CASES: dict[str, Callable[[float], Case]] = {
  f.__name__: f
  for f in (
    stalls,
    chat,
    clients,
    documents,
    in_order,
    shared,
    priorities,
    packing,
  )
}
