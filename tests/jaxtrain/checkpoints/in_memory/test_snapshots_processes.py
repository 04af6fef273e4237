"""Two processes of one program save together; one or two restore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints.in_memory.keeper import KeeperProcess
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.sharding import make_mesh
from tests.jaxtrain.checkpoints import two_processes

_CHILD = """
what, *keepers = arguments
import jax.numpy as jnp, numpy as np
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.sharding import make_mesh

def place(mesh, value, *axes):
  sharding = jax.sharding.NamedSharding(mesh, jax.P(*axes))
  return jax.make_array_from_callback(
    value.shape, sharding, lambda i: value[i])

def state(mesh, scale):
  w = scale * np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
  key = np.asarray(jax.random.key_data(jax.random.key(3)))
  return {
    'params': {
      'w': place(mesh, w, 'fsdp', 'tensor'),
      'shared': place(mesh, np.tile(w, (8, 8)).astype(jnp.bfloat16)),
    },
    'step': place(mesh, np.int32(scale)),
    'rng': jax.jit(jax.random.wrap_key_data)(place(mesh, key)),
  }

def check(restored, mesh, scale):
  want = state(mesh, scale)
  for a, b in zip(
      jax.tree.leaves(restored), jax.tree.leaves(want), strict=True):
    assert a.sharding == b.sharding, (a.sharding, b.sharding)
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
      assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()

mesh, other = make_mesh('data=2,fsdp=2,tensor=2'), make_mesh('fsdp=8')
with InMemorySnapshots(keepers, 1, timeout_s=30) as snapshots:
  if what == 'save':
    assert snapshots.steps() == []
    try:
      snapshots.save(1, {'params': jnp.ones(3)})
      raise AssertionError('an array of one process was taken')
    except ValueError as e:
      assert 'params is an array of one process' in str(e), e
    for step in (1, 2, 3):
      data = {'at': step, 'process': index if step == 3 else None}
      snapshots.save(step, state(mesh, step), data_state=data)
    assert snapshots.steps() == [2, 3], snapshots.steps()
    assert (snapshots.saved, snapshots.failed) == (3, 0)
  else:
    # Only one of the keepers that these are given was there before.
    assert snapshots.steps() == [2, 3], snapshots.steps()
  restored, data, _ = snapshots.restore(state(other, 0))
  check(restored, other, 3)
  assert data == {'at': 3, 'process': index}, data
  try:
    snapshots.restore(state(other, 0), step=1)
    raise AssertionError('step 1 was restored')
  except ValueError as e:
    assert 'no snapshot of step 1' in str(e), e
print('done')
"""


def _run(what, keepers):
  addresses = [k.address for k in keepers]
  for out in two_processes.run(_CHILD, what, *addresses):
    assert out.endswith('done\n')


def test_two_processes():
  keepers = [KeeperProcess(idle_exit_s=240) for _ in range(4)]
  try:
    _run('save', keepers)
    # The second process's host is lost... one of its keepers, as one may be.
    keepers[2].kill()
    mesh = make_mesh('tensor=4')
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, 'tensor'))
    target = {
      'params': {
        'w': jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding),
        'shared': jax.ShapeDtypeStruct(
          (512, 256), jnp.bfloat16, sharding=sharding
        ),
      },
      'step': jnp.int32(0),
      'rng': jax.random.key(0),
    }
    with InMemorySnapshots([k.address for k in keepers], 1) as snapshots:
      state, data_state, _ = snapshots.restore(target, step=2)
      # Both processes stood at the same place at step 2, but not at step 3.
      assert data_state == {'at': 2, 'process': None}
      with pytest.raises(ValueError, match='2 processes, which differ'):
        snapshots.restore(target, step=3)
    want = 2 * np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    np.testing.assert_array_equal(state['params']['w'], want)
    np.testing.assert_array_equal(
      state['params']['shared'], np.tile(want, (8, 8)).astype(jnp.bfloat16)
    )
    assert state['step'] == 2
    assert state['rng'] == jax.random.key(3)
    keepers[2] = KeeperProcess(idle_exit_s=240)
    _run('restore', [keepers[0], keepers[2]])
  finally:
    for keeper in keepers:
      keeper.kill()
