"""A signal sets a flag; the second one is as if nobody listened."""

import os
import signal
import threading

import jax
import numpy as np
import pytest

from jaxtrain.interrupt import StopSignal
from jaxtrain.interrupt import with_stop
from jaxtrain.sharding import make_mesh

_MESH = make_mesh('data=2,tensor=2')


@pytest.fixture(autouse=True)
def _interruptible():
  # A shell that starts tests with & makes them ignore this signal.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def _is_up(stop):
  step = jax.jit(with_stop(lambda state, batch: (state, {'loss': batch})))
  state, metrics = step(1.0, 2.0, stop.flags(_MESH))
  assert (state, metrics['loss']) == (1.0, 2.0)
  return bool(metrics['stop'])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_and_handlers_come_back(number):
  before = signal.getsignal(number)
  with StopSignal() as stop:
    assert not _is_up(stop)
    os.kill(os.getpid(), number)
    assert _is_up(stop)
    assert stop.name == signal.Signals(number).name
  assert signal.getsignal(number) is before


def test_second_signal_is_delivered_as_before():
  with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert _is_up(stop)
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()  # Not reached if the signal kills.


def test_outside_the_main_thread_nothing_is_handled():
  handlers = []

  def run():
    with StopSignal() as stop:
      handlers.append(signal.getsignal(signal.SIGTERM))
      assert not _is_up(stop)

  before = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert handlers == [before]


def test_one_process_of_several_is_enough():
  step = jax.jit(with_stop(lambda state, batch: (state, {})))
  _, metrics = step(0.0, 0.0, np.array([0, 0, 1, 0], np.int32))
  assert int(metrics['stop']) == 1
