"""A training that is killed again and again ends as one that never was."""

import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxtrain import metrics
from jaxtrain.checkpoints import orbax_io

_ROOT = pathlib.Path(__file__).parents[2]
_STEPS = 40
# Rows of means over 3 steps, checkpoints every 4, evaluations every 5.
_OVERRIDES = dict(log_every=3, save_every=4, eval_every=5, eval_batches=1)


def _start(workdir):
  command = [
    sys.executable,
    '-m',
    'experiments.train_lm',
    '--config=byte_stdlib_tiny',
    f'--workdir={workdir}',
    f'--steps={_STEPS}',
    '--simulate_devices=4',
    '--mesh=data=2,fsdp=2',
    *(f'--override={name}={value}' for name, value in _OVERRIDES.items()),
    f'--override=schedule.num_steps={_STEPS}',
  ]
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  pipe = subprocess.PIPE
  return subprocess.Popen(command, cwd=_ROOT, env=env, stderr=pipe, text=True)


def _rows(workdir):
  """Rows of metrics without what the clock says."""
  is_clock = lambda k: k in ('tokens_per_s', 'mfu') or k.startswith('goodput/')
  return [
    {k: v for k, v in row.items() if not is_clock(k)}
    for row in metrics.read(workdir)
  ]


def _last_state(workdir):
  """All arrays of the last checkpoint: parameters, optimizer, random key."""
  folder = workdir / 'checkpoints'
  with orbax_io.open_folder(folder, create=False) as manager:
    step = orbax_io.pick(manager, None)
    tree = manager.item_metadata(step)['state'].tree
    wanted = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
    )
    state = orbax_io.read_state(manager, step, wanted)
    return step, state, orbax_io.read_data_state(manager, step)


def _kill_somewhere(process, workdir, rng):
  """Kills it some time after it has made a few more steps; whether it could."""
  before = len(metrics.read(workdir))
  more = rng.randint(1, 4)
  while len(metrics.read(workdir)) < before + more:
    if process.poll() is not None:
      return False
    time.sleep(0.01)
  time.sleep(rng.random() * 0.3)
  process.kill()
  process.wait()
  return True


@pytest.mark.slow
def test_killed_runs_end_alike(tmp_path):
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  process = _start(straight)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err[-4000:]
  rng = random.Random(0)
  num_kills = 0
  for _ in range(5):
    process = _start(killed)
    if not _kill_somewhere(process, killed, rng):
      break
    num_kills += 1
  process = _start(killed)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err[-4000:]
  assert num_kills >= 2
  assert _rows(killed) == _rows(straight)
  step, state, data_state = _last_state(killed)
  other_step, other_state, other_data_state = _last_state(straight)
  assert step == other_step == _STEPS
  assert data_state == other_data_state
  jax.tree.map(np.testing.assert_array_equal, state, other_state)
