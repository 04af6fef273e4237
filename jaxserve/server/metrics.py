"""What `/metrics` shows, in the text format of Prometheus."""

from collections.abc import AsyncIterator
import time

import prometheus_client as prometheus
from prometheus_client import core

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.async_engine import Stream
from jaxserve.engine.outputs import Delta
from jaxserve.engine.runner import Runner

_SECONDS = (
  *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
  *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)


class ServerMetrics:
  """Counts what passes through the server.

  Args:
    engine: Its counters are shown too.
    runner: Its programs are.
  """

  content_type = prometheus.CONTENT_TYPE_LATEST

  def __init__(self, engine: AsyncEngine, runner: Runner):
    self._registry = prometheus.CollectorRegistry()
    counter = lambda name, doc, *labels: prometheus.Counter(
      f'onemesh_{name}', doc, labels, registry=self._registry
    )
    histogram = lambda name, doc: prometheus.Histogram(
      f'onemesh_{name}', doc, buckets=_SECONDS, registry=self._registry
    )
    self._answers = counter('http_answers', 'Answers.', 'path', 'status')
    self._finished = counter(
      'continuations_finished', 'Continuations by how they ended.', 'reason'
    )
    self._prompt = counter('prompt_tokens', 'Prompt tokens of finished ones.')
    self._cached = counter(
      'prefix_hit_tokens', 'Of these, found in the prefix cache.'
    )
    self._generated = counter('generated_tokens', 'Tokens sent to clients.')
    self._first_token_s = histogram(
      'time_to_first_token_seconds', 'From the request to its first token.'
    )
    self._inter_token_s = histogram(
      'inter_token_seconds', 'From a token to the next of its continuation.'
    )
    self._latency_s = histogram('request_seconds', 'From a request to its end.')
    self._registry.register(_EngineCollector(engine, runner))

  def text(self) -> bytes:
    """All of it, as Prometheus reads it."""
    return prometheus.generate_latest(self._registry)

  def count_answer(self, path: str, status: int) -> None:
    """Counts an answer; `path` is that of a route, of which there are few."""
    self._answers.labels(path, str(status)).inc()

  async def observed(
    self, stream: Stream, start_s: float
  ) -> AsyncIterator[Delta]:
    """Passes deltas on, and times them.

    Args:
      stream: Where they come from.
      start_s: When its request came, by `time.perf_counter`.
    """
    last_s, started = {}, set()
    async for delta in stream:
      now, key = time.perf_counter(), (delta.request_id, delta.index)
      if n := len(delta.token_ids):
        self._generated.inc(n)
        if delta.request_id not in started:
          started.add(delta.request_id)
          self._first_token_s.observe(now - start_s)
        if key in last_s:
          # Several at once came at the same pace.
          for _ in range(n):
            self._inter_token_s.observe((now - last_s[key]) / n)
        last_s[key] = now
      if delta.finish_reason is not None:
        self._finished.labels(delta.finish_reason).inc()
      if delta.output is not None:
        self._latency_s.observe(now - start_s)
        self._prompt.inc(len(delta.output.prompt_token_ids))
        self._cached.inc(delta.output.num_cached)
      yield delta


class _EngineCollector:
  """Reads the engine's counters when asked, while it runs."""

  def __init__(self, engine, runner):
    self._engine = engine
    self._runner = runner

  def collect(self):
    engine, runner, metrics = self._engine, self._runner, self._engine.metrics
    last = metrics.steps[-1] if metrics.steps else None
    gauges = {
      'requests_running': (
        'Continuations in the last step.',
        last.num_running if engine.num_unfinished and last else 0,
      ),
      'requests_waiting': (
        'Continuations that wait for room.',
        last.num_waiting if engine.num_unfinished and last else 0,
      ),
      'requests_unfinished': ('Both of these.', engine.num_unfinished),
      'pages': ('Pages of KV cache.', runner.cache_bytes // runner.page_bytes),
      'pages_in_use': ('Pages that requests hold.', engine.num_held_pages),
      'programs': ('Compiled programs.', len(runner.compile_seconds)),
      'compile_seconds': (
        'Time to compile them, summed.',
        sum(runner.compile_seconds.values()),
      ),
      'ready': ('1 if requests are taken.', int(engine.is_accepting)),
    }
    counters = {
      'steps': ('Steps run.', metrics.num_steps),
      'computed_tokens': ('Tokens computed.', metrics.num_computed),
      'padding_tokens': (
        'Tokens computed for nothing.',
        metrics.num_padding,
      ),
      'preemptions': (
        'Continuations stopped for want of pages.',
        metrics.num_preemptions,
      ),
      'swaps': ('Of these, swapped to the host.', metrics.num_swapped),
      'failed_steps': ('Steps that raised.', metrics.num_failed_steps),
      'poisoned': (
        'Continuations whose logits were not finite.',
        metrics.num_poisoned,
      ),
      'late_compiles': (
        'Compilations after the start.',
        runner.num_late_compiles,
      ),
    }
    for name, (doc, value) in gauges.items():
      yield core.GaugeMetricFamily(f'onemesh_{name}', doc, value)
    for name, (doc, value) in counters.items():
      yield core.CounterMetricFamily(f'onemesh_{name}', doc, value)
