"""One saver at a time; the dead lose their lock; readers need none."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoints import saver_lock
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.saver_lock import SaverLock

_ROOT = pathlib.Path(__file__).parents[3]
_STATE = {'params': jnp.ones(2)}
_OWNER = """
import sys, time
from jaxtrain.checkpoints.saver_lock import SaverLock
SaverLock(sys.argv[1]).acquire()
print('locked', flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  child = subprocess.Popen(
    [sys.executable, '-c', _OWNER, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == 'locked\n'
  yield child
  child.kill()
  child.wait()


def test_a_second_saver_is_refused_and_a_reader_is_not(tmp_path):
  with (
    CheckpointManager(tmp_path) as first,
    CheckpointManager(tmp_path) as other,
  ):
    first.save(1, _STATE)
    first.wait()
    message = rf'saved into by process {os.getpid()} on .*two runs would'
    with pytest.raises(ValueError, match=message):
      other.save(2, _STATE)
    with CheckpointManager(tmp_path) as reader:
      assert reader.restore(_STATE, 1)[0]['params'].shape == (2,)
    first.save(2, _STATE)
    first.close()
    assert other.save(3, _STATE)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    '00000001',
    '00000002',
    '00000003',
  ]


def test_another_process_is_refused_until_it_is_dead(tmp_path, owner):
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(ValueError, match=f'by process {owner.pid} on'):
      manager.save(1, _STATE)
    owner.kill()
    owner.wait()
    assert (tmp_path / 'saver.lock').exists()
    assert manager.save(1, _STATE)
  assert not (tmp_path / 'saver.lock').exists()


def _elsewhere(tmp_path):
  """Writes the lock of an owner on another machine."""
  path = tmp_path / 'saver.lock'
  owner = dict(host='far', pid=7, since='then', boot='another', ticks=1)
  path.write_text(json.dumps(owner))
  return path


def test_a_silent_owner_elsewhere_loses_the_lock(tmp_path):
  path = _elsewhere(tmp_path)
  lock = SaverLock(tmp_path, beat_s=0.05, stale_s=0.3)
  lock.acquire()
  assert json.loads(path.read_text())['pid'] == os.getpid()
  lock.release()


def test_an_owner_elsewhere_that_gives_signs_of_life_keeps_it(tmp_path):
  path = _elsewhere(tmp_path)
  stop = threading.Event()

  def beat():
    while not stop.wait(0.02):
      os.utime(path)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(ValueError, match='by process 7 on far .since then'):
      SaverLock(tmp_path, beat_s=0.05, stale_s=5).acquire()
  finally:
    stop.set()
    thread.join()
  assert json.loads(path.read_text())['pid'] == 7


def test_the_owner_gives_signs_of_life(tmp_path):
  lock = SaverLock(tmp_path, beat_s=0.02)
  lock.acquire()
  path = tmp_path / 'saver.lock'
  os.utime(path, (0, 0))
  waiting = threading.Event()
  for _ in range(100):
    if path.stat().st_mtime > 0:
      break
    waiting.wait(0.05)
  assert path.stat().st_mtime > 0
  lock.release()
  assert not path.exists()


def _no_flock(*args):
  raise OSError(38, 'Function not implemented')


def test_without_locks_of_the_kernel_the_process_is_looked_for(
  tmp_path, owner, monkeypatch
):
  monkeypatch.setattr(saver_lock.fcntl, 'flock', _no_flock)
  with pytest.raises(ValueError, match=f'process {owner.pid}'):
    SaverLock(tmp_path).acquire()
  owner.kill()
  owner.wait()
  lock = SaverLock(tmp_path)
  lock.acquire()
  lock.release()


@pytest.mark.parametrize('content', ['', '{"host"', '[]', '{"pid": 3}'])
def test_a_lock_file_of_a_killed_writer_is_taken_over(tmp_path, content):
  (tmp_path / 'saver.lock').write_text(content)
  lock = SaverLock(tmp_path)
  lock.acquire()
  lock.release()


def test_a_bucket_has_no_lock():
  lock = SaverLock('gs://bucket/run')
  lock.acquire()
  lock.release()
