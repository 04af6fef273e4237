"""Two processes agree on damage, on the step to resume, and on failure."""

import json

import pytest

from jaxtrain.checkpoints import file_list
from tests.jaxtrain.checkpoints import two_processes

_CHILD = """
import errno, json, time
(folder,) = arguments
import numpy as np
from jaxtrain.checkpoints import agreement, disk_space, file_list
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import make_mesh
import pathlib

mesh = make_mesh('fsdp=4')
def state(scale):
  w = scale * np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
  sharding = jax.sharding.NamedSharding(mesh, jax.P('fsdp'))
  return {'params': {'w': jax.make_array_from_callback(
    w.shape, sharding, lambda i: w[i])}}

def error_of(call):
  begin = time.monotonic()
  try:
    call()
  except Exception as e:
    # The processes' errors are alike; how long it took is not.
    assert time.monotonic() - begin < 60
    return f'{type(e).__name__}: {e}'
  return 'none'

said = {}
manager = CheckpointManager(folder, keep=3)
for step in (1, 2, 3):
  manager.save(step, state(step), data_state=step)
manager.wait()
said['bytes'] = manager.verify()
manager.close()

if index == 0:  # Damages rows that the other process wrote.
  path = pathlib.Path(folder) / '00000003'
  pieces = file_list.read(path).pieces
  span = next(
    p.span for p in pieces
    if p.span.array and 'process_1' in p.span.file)
  data = bytearray((path / span.file).read_bytes())
  data[span.start + 9] ^= 1
  (path / span.file).write_bytes(data)
agreement.gather('test', '')

manager = CheckpointManager(folder, keep=3)
said['restore'] = error_of(lambda: manager.restore(state(0)))
found = manager.resume(state(0))
said['resumed'] = [found.step, found.data_state, len(found.damaged)]
want = 2 * np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
for shard in found.state['params']['w'].addressable_shards:
  np.testing.assert_array_equal(shard.data, want[shard.index])

shortage, write_share = disk_space.shortage, file_list.write_share
if index == 1:
  disk_space.shortage = lambda *args: 'the disk is small'
said['no room'] = error_of(lambda: manager.save(3, state(3)))
disk_space.shortage = shortage

def full(*args):
  raise OSError(errno.ENOSPC, 'No space left on device')
if index == 1:
  file_list.write_share = full
assert manager.save(3, state(3))
said['full'] = error_of(manager.wait)
file_list.write_share = write_share

write = file_list.write
file_list.write = full
assert manager.save(3, state(3))
said['full at the end'] = error_of(manager.wait)
file_list.write = write

assert manager.save(3, state(3))
manager.close()
said['steps'] = manager.all_steps()
print('SAID', json.dumps(said))
"""


@pytest.fixture(scope='module')
def said(tmp_path_factory):
  """What each of two processes says, and their folder."""
  folder = tmp_path_factory.mktemp('processes')
  outputs = two_processes.run(_CHILD, folder, devices=2)
  return [json.loads(out.partition('SAID ')[2]) for out in outputs], folder


def test_both_name_the_damage_that_one_has_found(said):
  (first, second), _ = said
  assert first['restore'] == second['restore']
  assert first['restore'].startswith('DamagedError: checkpoint step 3')
  assert 'params/w [' in first['restore']
  assert 'ocdbt.process_1' in first['restore']


def test_each_reads_a_part(said):
  (first, second), folder = said
  sizes = file_list.read(folder / '00000002').sizes
  # All steps are of about the same size.
  assert abs(first['bytes'] + second['bytes'] - sum(sizes.values())) < 2000
  assert abs(first['bytes'] - second['bytes']) < 0.5 * sum(sizes.values())


def test_both_resume_from_the_step_before(said):
  (first, second), folder = said
  assert first['resumed'] == second['resumed'] == [2, 2, 1]
  assert (folder / '00000003.damaged').is_dir()


def test_both_refuse_a_save_that_one_has_no_room_for(said):
  (first, second), _ = said
  assert first['no room'] == second['no room']
  assert 'NoSpaceError' in first['no room']
  assert 'step 3 is not saved: the disk is small' in first['no room']


def test_both_learn_that_one_could_not_write(said):
  for key in ('full', 'full at the end'):
    for one in said[0]:
      assert one[key].startswith('NoSpaceError'), one[key]
      assert 'became full while step 3 was written' in one[key]
      assert 'the latest checkpoint is step 2' in one[key]


def test_the_step_is_saved_when_there_is_room_again(said):
  (first, second), folder = said
  assert first['steps'] == second['steps'] == [1, 2, 3]
  assert sorted(p.name for p in folder.iterdir()) == [
    '00000001',
    '00000002',
    '00000003',
    '00000003.damaged',
  ]
