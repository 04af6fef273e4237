"""What it says of whole, damaged, old and missing checkpoints, and its code."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import verify_checkpoint
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints.manager import CheckpointManager

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('checkpoints')
  noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  with CheckpointManager(folder) as manager:
    for step in (1, 2):
      manager.save(step, {'params': {'w': jnp.array(noise)}})
  return folder


@pytest.fixture
def damaged(saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  pieces = file_list.read(tmp_path / '00000002').pieces
  span = next(p.span for p in pieces if p.span.array)
  data = bytearray((tmp_path / '00000002' / span.file).read_bytes())
  data[7] ^= 1
  (tmp_path / '00000002' / span.file).write_bytes(data)
  return tmp_path


def test_whole_ones(saved, capsys):
  assert verify_checkpoint.verify(str(saved), None) == 0
  out = capsys.readouterr().out
  size = sum(file_list.read(saved / '00000001').sizes.values())
  assert f'step 1 is whole: {size:,} bytes' in out
  assert 'step 2 is whole' in out


def test_a_damaged_one(damaged, capsys):
  assert verify_checkpoint.verify(str(damaged), 1) == 0
  assert 'damaged' not in capsys.readouterr().out
  assert verify_checkpoint.verify(str(damaged), None) == 1
  out = capsys.readouterr().out
  assert 'step 1 is whole' in out
  assert 'params/w [0:64, 0:64]); use step 1' in out


def test_the_exit_code(damaged):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.verify_checkpoint',
      f'--directory={damaged}',
      '--step=2',
    ],
    cwd=_ROOT,
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1, done.stderr
  assert 'step 2' in done.stdout and 'params/w [0:64, 0:64]' in done.stdout


def test_there_is_none(saved, tmp_path, capsys):
  assert verify_checkpoint.verify(str(tmp_path / 'nowhere'), None) == 2
  assert not (tmp_path / 'nowhere').exists()
  assert verify_checkpoint.verify(str(tmp_path), None) == 2
  assert verify_checkpoint.verify(str(saved), 7) == 2
  out = capsys.readouterr().out
  assert 'is no folder' in out and 'no checkpoint in' in out
  assert 'step 7' in out and 'does not exist; use step 2 or 1' in out


def test_an_old_one(saved, tmp_path, capsys):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  meta = tmp_path / '00000001' / 'meta' / 'metadata'
  meta.write_text('{"config": null, "metadata": {}}')
  (tmp_path / '00000001' / 'files.json').unlink()
  assert verify_checkpoint.verify(str(tmp_path), 1) == 0
  assert 'saved without checksums' in capsys.readouterr().out
