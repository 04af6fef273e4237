"""Counters go on where the trace has forgotten."""

from jaxserve.engine.metrics import Metrics


def test_totals_outlive_the_trace():
  metrics = Metrics()
  for _ in range(100_002):
    metrics.record_step(
      num_tokens=3,
      bucket=4,
      num_running=1,
      num_waiting=0,
      pages_in_use=2,
      wasted_slots=1,
      page_size=4,
    )
  assert metrics.num_steps == 100_002 > len(metrics.steps)
  assert metrics.padding_fraction == 0.25
  assert metrics.wasted_slots_fraction == 1 / 8
