"""Rates from a clock that the test moves."""

import pytest

from jaxtrain import meter as meter_lib
from jaxtrain.hardware import Peak
from jaxtrain.meter import Meter


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(meter_lib.time, 'perf_counter', lambda: now[0])
  return now


def test_rates_leave_pauses_out(clock):
  meter = Meter(flops_per_token=4.0, peak=Peak(1000.0, 'test'))
  meter.start()
  clock[0] += 1
  meter.step(50)
  with meter.paused():
    clock[0] += 60
  clock[0] += 1
  meter.step(50)
  assert meter.recent() == {'tokens_per_s': 50, 'mfu': 0.2}
  assert meter.recent() == {}
  clock[0] += 3
  meter.step(50)
  assert meter.recent()['tokens_per_s'] == pytest.approx(50 / 3)
  assert meter.overall()['tokens_per_s'] == pytest.approx(150 / 5)


def test_time_before_a_pause_counts(clock):
  meter = Meter(flops_per_token=1.0, peak=None)
  meter.start()
  meter.step(10)
  clock[0] += 2
  with meter.paused():
    clock[0] += 5
  assert meter.overall() == {'tokens_per_s': 5}


def test_an_exception_ends_the_pause(clock):
  meter = Meter(flops_per_token=1.0, peak=None)
  meter.start()
  with pytest.raises(KeyError), meter.paused():
    clock[0] += 5
    raise KeyError
  clock[0] += 1
  meter.step(10)
  assert meter.overall() == {'tokens_per_s': 10}
