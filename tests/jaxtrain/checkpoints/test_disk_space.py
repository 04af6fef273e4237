"""No room is said before a save; a disk that fills up leaves what was there."""

import errno
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints import disk_space
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import NoSpaceError

pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def _noise(megabytes, seed=0):
  rng = np.random.default_rng(seed)
  return {'params': jnp.array(rng.random(megabytes << 18, np.float32))}


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 12 MB."""
  path = tmp_path / 'disk'
  path.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', str(path)]
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    pytest.skip('there is no mount here')
  if done.returncode:
    pytest.skip(f'may not mount a file system: {done.stderr.strip()}')
  yield path
  subprocess.run(['umount', '-l', str(path)], check=True)


def test_no_room_is_said_before_the_save(small_disk):
  state = _noise(2)
  with CheckpointManager(small_disk) as manager:
    manager.save(1, state)
    manager.wait()
    message = (
      rf'step 2 is not saved: {small_disk} has \d+.* free and the checkpoint '
      r'may take .*MB; .*the latest checkpoint is step 1'
    )
    with pytest.raises(NoSpaceError, match=message) as error:
      manager.save(2, _noise(11))
    assert error.value.errno == errno.ENOSPC
    assert manager.all_steps() == [1]
    assert manager.save(2, state)  # A smaller one fits.
    manager.wait()
    assert manager.all_steps() == [1, 2]


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
  small_disk, monkeypatch
):
  state = _noise(2)
  monkeypatch.setattr(disk_space, 'shortage', lambda *args: '')
  with CheckpointManager(small_disk) as manager:
    manager.save(1, state)
    manager.wait()
    assert manager.save(2, _noise(14))
    message = 'became full while step 2 .*the latest checkpoint is step 1'
    with pytest.raises(NoSpaceError, match=message):
      manager.wait()
    names = {p.name for p in small_disk.iterdir()}
    assert names == {'00000001', 'saver.lock'}
    assert manager.all_steps() == [1]
    manager.verify(1)
    # Training goes on, and the same step can be saved.
    assert manager.save(2, state)
    manager.wait()
    for step in (1, 2):
      restored, _, _ = manager.restore(state, step)
      jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_needed_bytes_are_those_of_the_arrays():
  mesh = jax.make_mesh((8,), ('x',))
  spec = jax.sharding.NamedSharding(mesh, jax.P())
  state = {
    'replicated': jax.device_put(np.zeros((64, 64), np.float32), spec),
    'numpy': np.zeros(10, np.int8),
    'number': 3,
  }
  more = disk_space.needed_bytes(state) - disk_space.needed_bytes({})
  assert more == 64 * 64 * 4 + 10 + 8


def test_shortage_of_folders_that_are_not_there_yet(tmp_path):
  free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
  folder = tmp_path / 'not' / 'there'
  assert not disk_space.shortage(folder, free // 2)
  found = disk_space.shortage(folder, 3 * free)
  assert str(folder) in found and 'keep fewer' in found
  assert not disk_space.shortage('gs://bucket/run', 10**30)


@pytest.mark.parametrize(
  'error, expected',
  [
    (OSError(errno.ENOSPC, 'x'), True),
    (OSError(errno.EDQUOT, 'x'), True),
    (OSError(errno.EACCES, 'x'), False),
    (ValueError('RESOURCE_EXHAUSTED: write: No space left on device'), True),
    (ValueError('a shape'), False),
  ],
)
def test_full_disks_are_told_apart(error, expected):
  assert disk_space.is_full(error) == expected
  outer = RuntimeError('outer')
  outer.__cause__ = error
  assert disk_space.is_full(outer) == expected
