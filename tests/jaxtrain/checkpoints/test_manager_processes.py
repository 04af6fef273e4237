"""Two processes save and restore together, and one reads what two wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import make_mesh
from tests.jaxtrain.checkpoints import two_processes

_CHILD = """
(folder,) = arguments
import jax.numpy as jnp, numpy as np
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import make_mesh

def place(mesh, value, *axes):
  sharding = jax.sharding.NamedSharding(mesh, jax.P(*axes))
  return jax.make_array_from_callback(
    value.shape, sharding, lambda i: value[i])

def state(mesh, scale):
  w = scale * np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
  key = np.asarray(jax.random.key_data(jax.random.key(3)))
  return {
    'params': {'w': place(mesh, w, 'fsdp', 'tensor')},
    'step': place(mesh, np.int32(5)),
    'rng': jax.jit(jax.random.wrap_key_data)(place(mesh, key)),
  }

mesh = make_mesh('data=2,fsdp=2,tensor=2')
with CheckpointManager(folder, keep=2) as manager:
  try:
    manager.save(1, {'params': jnp.ones(3)})
    raise AssertionError('an array of one process was taken')
  except ValueError as e:
    assert 'params is an array of one process' in str(e), e
  for step in (1, 2, 3):
    data = {'position': step, 'process': index if step == 3 else None}
    assert manager.save(step, state(mesh, step), data_state=data)
  manager.wait()
  assert manager.all_steps() == [2, 3]
  other = make_mesh('fsdp=8')
  restored, data, _ = manager.restore(state(other, 0))
assert data == {'position': 3, 'process': index}, data
w = restored['params']['w']
assert w.sharding.mesh == other
for shard in w.addressable_shards:
  want = 3 * np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
  np.testing.assert_array_equal(shard.data, want[shard.index])
assert int(jax.random.key_data(restored['rng']).addressable_data(0)[1]) == 3
print('done')
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  for out in two_processes.run(_CHILD, folder):
    assert out.endswith('done\n')
  return folder


def test_one_process_reads_what_two_wrote(folder):
  mesh = make_mesh('tensor=4')
  target = {
    'params': {
      'w': jax.ShapeDtypeStruct(
        (64, 32),
        jnp.float32,
        sharding=jax.sharding.NamedSharding(mesh, jax.P(None, 'tensor')),
      )
    },
    'step': jnp.int32(0),
    'rng': jax.random.key(0),
  }
  with CheckpointManager(folder) as manager:
    state, data_state, _ = manager.restore(target, step=2)
    # Both processes stood at the same place at step 2, but not at step 3.
    assert data_state == {'position': 2, 'process': None}
    with pytest.raises(ValueError, match='2 processes, which differ'):
      manager.restore(target, step=3)
  want = 2 * np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
  np.testing.assert_array_equal(state['params']['w'], want)
  assert state['step'] == 5
  assert state['rng'] == jax.random.key(3)


def test_only_whole_checkpoints_are_left(folder):
  assert sorted(p.name for p in folder.iterdir()) == ['00000002', '00000003']
