"""A few kills and damages; and that a loss would be noticed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_ENV = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}


def _run(tmp_path, seed, timeout_s, **counts):
  """Runs the benchmark in a process that has not started JAX."""
  out = tmp_path / 'kills.json'
  command = [
    sys.executable,
    '-m',
    'experiments.benchmarks.checkpoint_kills',
    f'--out={out}',
    f'--seed={seed}',
    *(f'--{name}={count}' for name, count in counts.items()),
  ]
  done = subprocess.run(
    command,
    cwd=_ROOT,
    env=_ENV,
    capture_output=True,
    text=True,
    timeout=timeout_s,
  )
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
  results = json.loads(out.read_text())
  assert results['num_failures'] == 0
  return results


def test_a_few(tmp_path):
  counts = dict(kills=4, pairs=0, damaged=2, full=1)
  results = _run(tmp_path, seed=1, timeout_s=280, **counts)
  assert sum(results['kills']['1 processes']['left'].values()) == 4
  assert all(r['trials'] == 2 for r in results['damage'].values())


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(2))
def test_many(tmp_path, seed):
  counts = dict(kills=25, pairs=5, damaged=10, full=10)
  results = _run(tmp_path, seed=seed, timeout_s=1800, **counts)
  left = results['kills']['1 processes']['left']
  # The moments are spread over the save and what is around it.
  assert left['unfinished'] > 5


_LOSSES = """
import pathlib, random, shutil, sys, tqdm
from experiments.benchmarks import checkpoint_kills as kills
from jaxtrain.checkpoints import file_list

tqdm.tqdm.monitor_interval = 0
folder = pathlib.Path(sys.argv[1]) / 'checkpoints'
killer = kills.Killer(folder, 1, random.Random(0))
killer.trial()
for path in folder.iterdir():  # What was finished is lost.
  if path.name.isdigit():
    shutil.rmtree(path)
try:
  killer.check()
  raise SystemExit('a lost checkpoint was not noticed')
except AssertionError as e:
  assert 'was finished' in str(e), e

# Without checksums a flipped bit goes unnoticed.
file_list.damage = lambda *args: []
found = kills.damages('flipped', 2, 1, tqdm.tqdm(disable=True))
assert len(found['failures']) == 2, found
print('noticed')
"""


def test_a_loss_would_be_noticed(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', _LOSSES, str(tmp_path)],
    cwd=_ROOT,
    env=_ENV,
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.stdout == 'noticed\n', done.stdout + done.stderr[-4000:]
