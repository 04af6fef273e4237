"""The binary: killed and resumed, on two processes, with wrong names."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments import configs
from experiments import training
from jaxtrain import metrics as metrics_lib

_ROOT = pathlib.Path(__file__).parents[2]
_TIMEOUT_S = 240
_MESH = 'data=2,fsdp=2,tensor=2'


def _start(workdir, *arguments, devices=8, steps=8):
  env = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    JAX_COMPILATION_CACHE_DIR=str(_ROOT / '.cache' / 'jax_binaries'),
    XLA_FLAGS='',
  )
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'experiments.train_lm',
      '--config=byte_stdlib_tiny',
      f'--workdir={workdir}',
      f'--mesh={_MESH}',
      f'--simulate_devices={devices}',
      f'--steps={steps}',
      '--override=log_every=1',
      '--override=schedule.num_steps=100',
      '--override=eval_batches=2',
      *arguments,
    ],
    cwd=_ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(*processes):
  """Outputs of processes that must end well; kills them all if one hangs."""
  try:
    outputs = [p.communicate(timeout=_TIMEOUT_S)[0] for p in processes]
  finally:
    for p in processes:
      p.kill()
  for p, output in zip(processes, outputs, strict=True):
    assert p.returncode == 0, output[-3000:]
  return outputs


def _losses(workdir):
  return {r['step']: r['loss'] for r in metrics_lib.read(workdir)}


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """One process with 8 devices, uninterrupted."""
  workdir = tmp_path_factory.mktemp('straight')
  (output,) = _finish(_start(workdir))
  assert 'held-out loss' in output
  return workdir


def _wait_for_a_step(workdir, process):
  deadline = time.monotonic() + _TIMEOUT_S
  while not _losses(workdir) and time.monotonic() < deadline:
    if process.poll() is not None:
      break
    time.sleep(0.05)


def test_two_processes_equal_one(straight, tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  processes = [
    _start(
      tmp_path,
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={i}',
      devices=4,
    )
    for i in range(2)
  ]
  _wait_for_a_step(tmp_path, processes[0])
  # Only one of them is told to stop, and it is not the one that writes.
  processes[1].send_signal(signal.SIGTERM)
  _finish(*processes)
  expected, got = _losses(straight), _losses(tmp_path)
  assert got and got == pytest.approx(
    {step: expected[step] for step in got}, abs=2e-6
  )
  # One process reads what two wrote, and goes on as if it had been there.
  (output,) = _finish(_start(tmp_path))
  assert f'resumed from step {max(got)} ' in output
  assert _losses(tmp_path) == pytest.approx(expected, abs=5e-6)


def test_sigterm_saves_and_the_same_command_goes_on(straight, tmp_path):
  process = _start(tmp_path)
  _wait_for_a_step(tmp_path, process)
  process.send_signal(signal.SIGTERM)
  (output,) = _finish(process)
  if 'stopped by SIGTERM' in output:  # Else it was faster than the signal.
    assert len(_losses(tmp_path)) < 8
  _finish(_start(tmp_path))
  assert _losses(tmp_path) == _losses(straight)


@pytest.mark.parametrize('name', configs.names())
def test_configs_name_arguments_of_a_run(name):
  configs.check(configs.load(name), training.run, training.OPTIONS)


@pytest.mark.parametrize(
  'override, message',
  [
    ('optimizer.name="adamx"', 'adamx.*adamw'),
    ('schedule.name="flat"', 'flat.*warmup_cosine'),
    ('source="web"', 'web.*stdlib'),
    ('rules="mine"', 'mine.*default'),
    ('remat="some"', 'some.*dots_no_batch'),
    ('mesh="pipe=2"', 'pipe.*tensor'),
    ('mesh="data=64"', '64 devices'),
    ('dtype="int8"', 'int8.*bfloat16'),
    ('optimizer.b3=1', "adamw.*'b3'"),
    ('seq_len=4096', 'seq_len=4096.*max_seq_len=128'),
    ('model.vocab_size=100', '264 ids.*vocab_size=100'),
    ('tokenizer="nowhere"', 'nowhere'),
    ('batch_size=0', 'batch_size=0'),
    ('model.layers=3', 'layers.*num_layers'),
    ('learning_rat=1', 'learning_rat.*steps'),
    ('steps', 'not key=value'),
    ('steps.x=1', 'inside'),
  ],
)
def test_wrong_names_list_what_is_known(override, message):
  with pytest.raises(ValueError, match=message):
    config = configs.load('byte_stdlib_tiny', [override])
    configs.check(config, training.run, training.OPTIONS)
    training.run(None, **config)


def test_config_from_a_path(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('def get_config():\n  return dict(steps=3, x=dict(y=1))\n')
  assert configs.load(str(path), ['x.y=[1, 2]', 'x.z=word']) == dict(
    steps=3, x=dict(y=[1, 2], z='word')
  )
  with pytest.raises(ValueError, match='config lacks'):
    configs.check(dict(steps=3), training.run, training.OPTIONS)
  path.write_text('')
  with pytest.raises(ValueError, match='no get_config'):
    configs.load(str(path))
  with pytest.raises(ValueError, match="no config 'tiny'.*byte_stdlib_tiny"):
    configs.load('tiny')
