"""Trainers that die, hang or compute wrongly, for real."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments.benchmarks import faults as faults_lib
from experiments.elastic import exit_codes
from jaxtrain import goodput
from jaxtrain import metrics

_ROOT = pathlib.Path(__file__).parents[2]
_TIMEOUT_S = 500
_OVERRIDES = (
  'batch_size=12',
  'log_every=1',
  'eval_batches=0',
  'save_every=4',
  'schedule.num_steps=100',
)


def _start(module, workdir, *arguments):
  env = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    JAX_COMPILATION_CACHE_DIR=str(_ROOT / '.cache' / 'jax_binaries'),
    XLA_FLAGS='',
  )
  return subprocess.Popen(
    [
      *(sys.executable, '-m', module, '--config=byte_stdlib_tiny'),
      *(f'--workdir={workdir}', '--mesh=data=3'),
      *(f'--override={o}' for o in _OVERRIDES),
      *arguments,
    ],
    cwd=_ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _supervise(workdir, *arguments, steps, faults=()):
  faults_lib.write(workdir, faults)
  return _start(
    'experiments.supervise',
    workdir,
    '--trainer=experiments.benchmarks.faulty_trainer',
    '--num_processes=3',
    f'--steps={steps}',
    *arguments,
  )


def _finish(process):
  try:
    return process.communicate(timeout=_TIMEOUT_S)[0]
  finally:
    process.kill()


def _events(workdir, kind):
  lines = (workdir / 'supervise.jsonl').read_text().splitlines()
  return [e for e in map(json.loads, lines) if e['event'] == kind]


def _losses(workdir):
  return {r['step']: r['loss'] for r in metrics.read(workdir)}


def _pids(workdir):
  return [p for e in _events(workdir, 'start') for p in e['pids'].values()]


def _wait_for_step(workdir, step, process):
  deadline = time.monotonic() + _TIMEOUT_S
  while max(_losses(workdir), default=0) < step:
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)


def _wait_until_gone(pids):
  deadline = time.monotonic() + 30
  while any(pathlib.Path(f'/proc/{p}').exists() for p in pids):
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """One process, nothing happens to it."""
  workdir = tmp_path_factory.mktemp('straight')
  process = _start(
    'experiments.train_lm', workdir, '--simulate_devices=3', '--steps=30'
  )
  output = _finish(process)
  assert process.returncode == 0, output[-3000:]
  return _losses(workdir)


@pytest.mark.slow
def test_killed_goes_on_with_the_rest_and_grows_back(straight, tmp_path):
  process = _supervise(
    tmp_path,
    '--regrow_after_s=2',
    '--snapshot_every=1',
    steps=30,
    faults=[(1, 6, 'kill')],
  )
  output = _finish(process)
  assert process.returncode == 0, output[-5000:]
  starts = _events(tmp_path, 'start')
  assert [(e['mesh'], e['slots']) for e in starts] == [
    ('data=3', [0, 1, 2]),
    ('data=2', [0, 2]),
    ('data=3', [0, 1, 2]),
  ]
  assert [e['lost'] for e in _events(tmp_path, 'kill')][0] == [1]
  recovered = _events(tmp_path, 'recovered')
  # With a snapshot of every step at most the last one is lost.
  assert recovered[1]['lost_steps'] <= 1
  assert recovered[2]['lost_steps'] == 0
  assert re.search(r'resumed from step [56] in memory', output)
  assert _losses(tmp_path) == pytest.approx(straight, rel=1e-4)
  record = goodput.read(tmp_path)
  assert len(record.incarnations) == 3
  assert record.seconds['restart'] > 0
  assert sum(i.lost_steps for i in record.incarnations) <= 1
  _wait_until_gone(_pids(tmp_path))


@pytest.mark.slow
def test_garbage_hang_and_freeze_are_found(straight, tmp_path):
  process = _supervise(
    tmp_path,
    '--regrow_after_s=1e9',
    '--hang_floor_s=10',
    '--alive_s=15',
    steps=30,
    faults=[(2, 6, 'flip'), (0, 14, 'freeze'), (1, 22, 'hang')],
  )
  output = _finish(process)
  assert process.returncode == 0, output[-5000:]
  flip, freeze, hang, _ = _events(tmp_path, 'kill')
  assert 'differ' in flip['why'] and flip['lost'] == [2]
  assert 'no sign of life' in freeze['why'] and freeze['lost'] == [0]
  # It is the last one, and is started again.
  assert 'no sign of life' in hang['why'] and hang['lost'] == []
  assert [e['mesh'] for e in _events(tmp_path, 'start')] == [
    *('data=3', 'data=2', 'data=1', 'data=1')
  ]
  # What was saved after the flip is not what it goes on from.
  assert _events(tmp_path, 'recovered')[1]['first_step'] <= 6
  assert _losses(tmp_path) == pytest.approx(straight, rel=1e-4)
  _wait_until_gone(_pids(tmp_path))


@pytest.mark.slow
def test_poisoned_data_are_named(tmp_path):
  process = _supervise(tmp_path, steps=30, faults=[(2, 6, 'nan', True)])
  output = _finish(process)
  assert process.returncode == exit_codes.POISONED, output[-5000:]
  assert 'step 7 is not finite a second time' in output
  assert list(tmp_path.glob('non_finite_step_7_process_*.npz'))
  assert [e['lost'] for e in _events(tmp_path, 'kill')] == [[], []]


@pytest.mark.slow
def test_signals_reach_the_trainers_and_nobody_is_left(straight, tmp_path):
  process = _supervise(tmp_path, '--snapshot_every=2', steps=30)
  _wait_for_step(tmp_path, 2, process)
  process.send_signal(signal.SIGTERM)
  output = _finish(process)
  assert process.returncode == exit_codes.STOPPED, output[-5000:]
  assert 'stopped at step' in output
  _wait_until_gone(_pids(tmp_path))
  stopped = _losses(tmp_path)
  assert stopped == pytest.approx(
    {step: straight[step] for step in stopped}, rel=1e-4
  )
  # Goes on, and is killed itself.
  process = _supervise(tmp_path, '--snapshot_every=2', steps=10**6)
  _wait_for_step(tmp_path, max(stopped) + 2, process)
  group = subprocess.run(
    ['ps', '-o', 'pid=', '--ppid', str(process.pid)],
    capture_output=True,
    text=True,
  )
  children = [int(p) for p in group.stdout.split()]
  assert set(_pids(tmp_path)[-3:]) < set(children)  # Keepers, too.
  process.kill()
  process.communicate(timeout=60)
  _wait_until_gone(children)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'give --config= and --workdir='),
    (['--config=byte_stdlib_tiny', '--workdir=x', '--mesh=data=8'], 'need'),
    (['--config=tiny', '--workdir=x'], "no config 'tiny'"),
  ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.supervise', *arguments],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == exit_codes.WRONG
  assert message in done.stderr and 'Traceback' not in done.stderr
