"""The newest whole checkpoint is resumed; deleting and finishing are atomic."""

import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import removal
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import DamagedError

pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def _state(value):
  noise = np.random.default_rng(0).normal(size=(64, 64))
  return {'params': {'w': jnp.array(value + noise, jnp.float32)}}


@pytest.fixture
def folder(tmp_path):
  """Steps 1, 2 and 3."""
  with CheckpointManager(tmp_path) as manager:
    for step in (1, 2, 3):
      manager.save(step, _state(step), data_state=step, metadata={'m': step})
  return tmp_path


def _damage(folder, step):
  """Flips a bit in the values of 'w'."""
  path = folder / f'{step:08d}'
  pieces = file_list.read(path).pieces
  span = next(p.span for p in pieces if p.span.array == 'params/w')
  data = bytearray((path / span.file).read_bytes())
  data[span.start + span.size // 2] ^= 4
  (path / span.file).write_bytes(data)


def _assert_equal(state, expected):
  np.testing.assert_array_equal(state['params']['w'], expected['params']['w'])


def _names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_nothing_is_damaged(folder):
  with CheckpointManager(folder) as manager:
    found = manager.resume(_state(0))
  assert (found.step, found.data_state, found.metadata) == (3, 3, {'m': 3})
  _assert_equal(found.state, _state(3))
  assert found.damaged == []


def test_there_is_nothing(tmp_path):
  with CheckpointManager(tmp_path) as manager:
    assert manager.resume(_state(0)) is None


def test_damaged_ones_are_named_and_passed_over(folder, caplog):
  _damage(folder, 3)
  (folder / '00000002' / 'state' / 'manifest.ocdbt').unlink()
  with CheckpointManager(folder, keep=1) as manager:
    found = manager.resume(_state(0))
    assert found.step == 1
    _assert_equal(found.state, _state(1))
    newest, other = found.damaged
    assert 'step 3' in newest and 'params/w [0:' in newest
    assert 'step 2' in other and 'manifest.ocdbt is missing' in other
    assert 'use' not in newest
    assert newest in caplog.text and '00000003.damaged' in caplog.text
    assert manager.all_steps() == [1]
    # A damaged one must not count as the newest to keep.
    manager.save(2, _state(2))
    manager.wait()
    assert manager.latest_step() == 2
  assert _names(folder) == ['00000002', '00000002.damaged', '00000003.damaged']


def test_a_step_asked_for_is_not_replaced_by_another(folder):
  _damage(folder, 3)
  with CheckpointManager(folder) as manager:
    for step in (3, None):
      with pytest.raises(DamagedError, match='step 3.*use step 2 or 1'):
        manager.restore(_state(0), step)
  assert _names(folder) == ['00000001', '00000002', '00000003']


def test_none_is_whole(folder):
  for step in (1, 2, 3):
    _damage(folder, step)
  with CheckpointManager(folder) as manager:
    with pytest.raises(DamagedError, match='whole: .*step 3.*step 2.*step 1'):
      manager.resume(_state(0))
  # Nothing was renamed: the next run must not begin anew unasked.
  assert _names(folder) == ['00000001', '00000002', '00000003']


def test_a_state_that_does_not_fit_is_no_damage(folder):
  with CheckpointManager(folder) as manager:
    with pytest.raises(ValueError, match='does not fit') as error:
      manager.resume({'params': {'w': jnp.zeros(3)}})
  assert type(error.value) is ValueError
  assert _names(folder) == ['00000001', '00000002', '00000003']


def test_no_permission_is_no_damage(folder, monkeypatch):
  def refuse(*args):
    raise PermissionError(13, 'Permission denied')

  with CheckpointManager(folder) as manager:
    monkeypatch.setattr(file_list, 'check_sizes', refuse)
    with pytest.raises(PermissionError):
      manager.resume(_state(0))
  assert _names(folder) == ['00000001', '00000002', '00000003']


def test_damaged_again_finds_another_name(tmp_path):
  for expected in ('1.damaged', '1.damaged-2', '1.damaged-3'):
    (tmp_path / '1').mkdir()
    assert removal.set_aside(tmp_path / '1').name == expected
  assert _names(tmp_path) == ['1.damaged', '1.damaged-2', '1.damaged-3']


def test_a_process_killed_while_deleting_leaves_no_checkpoint_with_holes(
  folder, monkeypatch
):
  def die(path, **kwargs):
    (pathlib.Path(path) / 'files.json').unlink()
    raise KeyboardInterrupt

  monkeypatch.setattr(removal.shutil, 'rmtree', die)
  with pytest.raises(KeyboardInterrupt):
    removal.Deleter(folder, lambda step: f'{step:08d}').delete(1)
  monkeypatch.undo()
  assert _names(folder) == ['00000001.deleted', '00000002', '00000003']
  with CheckpointManager(folder) as manager:
    assert manager.all_steps() == [2, 3]
    manager.save(4, _state(4))
  assert _names(folder) == ['00000002', '00000003', '00000004']


def test_what_is_kept_is_deleted_at_once(folder, monkeypatch):
  """Orbax deletes through ours, after the new one has its name."""
  seen = []
  rmtree = shutil.rmtree

  def watch(path, **kwargs):
    seen.append((pathlib.Path(path).name, (folder / '00000004').exists()))
    rmtree(path, **kwargs)

  monkeypatch.setattr(removal.shutil, 'rmtree', watch)
  with CheckpointManager(folder, keep=2) as manager:
    manager.save(4, _state(4))
  assert seen == [('00000001.deleted', True), ('00000002.deleted', True)]


def test_all_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
  """Of what is restored, every file and folder: tensorstore's or ours."""
  log = []
  fsync, rename = os.fsync, os.rename

  def note_fsync(fd):
    log.append(('fsync', os.readlink(f'/proc/self/fd/{fd}')))
    fsync(fd)

  def note_rename(old, new, **kwargs):
    log.append(('rename', str(old)))
    rename(old, new, **kwargs)

  monkeypatch.setattr(os, 'fsync', note_fsync)
  monkeypatch.setattr(os, 'rename', note_rename)
  monkeypatch.setattr(os, 'replace', note_rename)
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, _state(1))
  temporary = f'{tmp_path}/00000001.orbax-checkpoint-tmp'
  end = log.index(('rename', temporary))
  synced = {path for kind, path in log[:end] if kind == 'fsync'}
  sizes = file_list.read(tmp_path / '00000001').sizes
  arrays = {f for f in sizes if '/ocdbt.process_0/' in f}
  for name in (*(sizes.keys() - arrays), file_list.NAME, 'state', 'meta'):
    assert f'{temporary}/{name}' in synced, name
  # And then the name itself.
  assert ('fsync', str(tmp_path)) in log[end:]
