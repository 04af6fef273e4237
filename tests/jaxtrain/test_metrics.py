"""Metrics are there after a kill, once for each step, and in TensorBoard."""

import csv
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jaxtrain.metrics import MetricsWriter
from jaxtrain.metrics import read

_ROOT = pathlib.Path(__file__).parents[2]


def _rows(folder):
  with (folder / 'metrics.csv').open(newline='') as f:
    return list(csv.reader(f))


def _events(folder):
  """`{(step, name): value}`, later files and purges applied."""
  scalars = {}
  for path in sorted((folder / 'tensorboard').iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from('<Q', data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      at += 16 + length
      if event.WhichOneof('what') not in ('summary', 'file_version'):
        # A restart, which hides what came at this step and later.
        scalars = {k: v for k, v in scalars.items() if k[0] < event.step}
      for value in event.summary.value:
        scalars[event.step, value.tag] = value.simple_value
  return scalars


def test_one_row_a_step_in_both_files(tmp_path):
  with MetricsWriter(tmp_path / 'run') as writer:
    writer.write(10, {'loss': 2.5, 'tokens/s': 100})
    writer.write(20, {'loss': jnp.float32(0.1), 'tokens/s': np.int64(200)})
  folder = tmp_path / 'run'
  assert _rows(folder) == [
    ['step', 'loss', 'tokens/s'],
    ['10', '2.5', '100.0'],
    ['20', repr(float(np.float32(0.1))), '200.0'],
  ]
  assert _events(folder) == {
    (10, 'loss'): 2.5,
    (10, 'tokens/s'): 100.0,
    (20, 'loss'): float(np.float32(0.1)),
    (20, 'tokens/s'): 200.0,
  }


def test_metrics_may_come_later_and_in_parts(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {'a': 1.0})
  writer.write(2, {'a': 2.0})
  writer.write(2, {'eval, "b"': 2.5})
  writer.write(2, {'a': 2.25})
  writer.write(3, {'a': 3.0})
  writer.write(3, {})
  expected = [
    ['step', 'a', 'eval, "b"'],
    ['1', '1.0', ''],
    ['2', '2.25', '2.5'],
    ['3', '3.0', ''],
  ]
  assert _rows(tmp_path) == expected  # Before it is closed.
  writer.close()
  assert _rows(tmp_path) == expected
  assert read(tmp_path)[1] == {'step': 2, 'a': 2.25, 'eval, "b"': 2.5}
  assert sorted(os.listdir(tmp_path)) == ['metrics.csv', 'tensorboard']


def test_values_survive_exactly(tmp_path):
  values = [1 / 3, 1e-300, math.inf, -math.inf, 0.1 + 0.2, -0.0]
  with MetricsWriter(tmp_path) as writer:
    for step, value in enumerate(values):
      writer.write(step, {'x': value})
    writer.write(len(values), {'x': math.nan})
  back = [row['x'] for row in read(tmp_path)]
  assert back[:-1] == values and math.isnan(back[-1])


def test_a_resumed_run_repeats_no_step(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in (10, 20, 30, 40):
      writer.write(step, {'loss': float(step), 'old': 0.0})
  with MetricsWriter(tmp_path) as writer:  # From a checkpoint of step 20.
    for step in (30, 40, 50):
      writer.write(step, {'loss': step + 0.5})
      writer.write(step, {'new': 1.0})
  assert _rows(tmp_path) == [
    ['step', 'loss', 'old', 'new'],
    ['10', '10.0', '0.0', ''],
    ['20', '20.0', '0.0', ''],
    ['30', '30.5', '', '1.0'],
    ['40', '40.5', '', '1.0'],
    ['50', '50.5', '', '1.0'],
  ]
  losses = {
    s: v for (s, name), v in _events(tmp_path).items() if name == 'loss'
  }
  assert losses == {10: 10, 20: 20, 30: 30.5, 40: 40.5, 50: 50.5}


def test_a_new_run_from_the_start_replaces_all(tmp_path):
  for value in (1.0, 2.0):
    with MetricsWriter(tmp_path) as writer:
      writer.write(1, {f'loss{value}': value})
  assert _rows(tmp_path) == [['step', 'loss2.0'], ['1', '2.0']]


def test_opening_alone_changes_nothing(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'a': 1.0})
  before = (tmp_path / 'metrics.csv').read_bytes()
  MetricsWriter(tmp_path).close()
  assert (tmp_path / 'metrics.csv').read_bytes() == before


def test_rows_survive_a_kill(tmp_path):
  code = (
    'import os, signal, sys\n'
    'from jaxtrain.metrics import MetricsWriter\n'
    'writer = MetricsWriter(sys.argv[1])\n'
    'for step in range(5): writer.write(step, {"a": step})\n'
    'os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  child = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    timeout=120,
  )
  assert child.returncode == -signal.SIGKILL
  assert [r['a'] for r in read(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_torn_last_row_is_dropped(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'a': 1.0})
    writer.write(2, {'a': 22.0})
  path = tmp_path / 'metrics.csv'
  path.write_bytes(path.read_bytes()[:-4])
  assert read(tmp_path) == [{'step': 1, 'a': 1.0}]
  with MetricsWriter(tmp_path) as writer:
    writer.write(3, {'a': 3.0})
  assert [r['step'] for r in read(tmp_path)] == [1, 3]


def test_only_process_zero_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with MetricsWriter(tmp_path / 'run') as writer:
    writer.write(1, {'a': 1.0})
  assert not (tmp_path / 'run').exists()


def test_wrong_use_is_named(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(5, {'a': 1.0})
    with pytest.raises(ValueError, match='step=4 comes after step 5'):
      writer.write(4, {'a': 1.0})
    with pytest.raises(ValueError, match="may not be called 'step'"):
      writer.write(6, {'step': 1.0})
    with pytest.raises(ValueError, match="metric 'a' is not a scalar"):
      writer.write(6, {'a': jnp.ones(3)})
    writer.write(6, {'a': 2.0})
  assert [r['step'] for r in read(tmp_path)] == [5, 6]
