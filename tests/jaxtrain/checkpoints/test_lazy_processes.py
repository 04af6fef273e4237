"""Two processes save lazily while they train together, and both restore."""

from tests.jaxtrain.checkpoints import two_processes

_CHILD = """
(folder,) = arguments
import threading
from jax.experimental import multihost_utils
import numpy as np
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import make_mesh

main = threading.current_thread()
collective = multihost_utils.sync_global_devices
def watched(name):
  assert threading.current_thread() is main, name
  collective(name)
multihost_utils.sync_global_devices = watched

def place(mesh, value, *axes):
  sharding = jax.sharding.NamedSharding(mesh, jax.P(*axes))
  return jax.make_array_from_callback(
    value.shape, sharding, lambda i: value[i])

w = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
mesh = make_mesh('data=2,fsdp=2,tensor=2')
def state(mesh):
  return {
    'params': {
      'w': place(mesh, w, 'fsdp', 'tensor'),
      'r': place(mesh, w[0]), 'b': place(mesh, w[1, :7])},
    'step': place(mesh, np.int32(0))}
now = state(mesh)
# Every step sums over all devices of both processes, as training does.
@jax.jit
def gradients(s):
  w = s['params']['w']
  return 1 + 0 * (w.sum() + (w @ w.T).sum())
update = jax.jit(
  lambda s, g: jax.tree.map(lambda x: x + g.astype(x.dtype), s),
  donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, now))
with CheckpointManager(
    folder, keep=8, saving='lazy', staging_gib=12_000 / 2**30) as manager:
  for step in range(8):
    assert manager.save(step, now, data_state={'position': step})
    found = gradients(now)
    manager.wait_copied()
    now = update(now, found)
  manager.wait()
  assert manager.all_steps() == list(range(8)), manager.all_steps()
  other = make_mesh('fsdp=8')
  for step in range(8):
    restored, data, _ = manager.restore(
      {'params': {'w': place(other, w, 'fsdp'), 'r': place(other, w[0]),
                  'b': place(other, w[1, :7])},
       'step': place(other, np.int32(0))}, step)
    assert data == {'position': step}, data
    assert int(restored['step'].addressable_data(0)) == step
    for name, first in dict(w=w, r=w[0], b=w[1, :7]).items():
      for shard in restored['params'][name].addressable_shards:
        np.testing.assert_array_equal(shard.data, first[shard.index] + step)
print('done', manager._lazy.staging.peak_bytes)
"""


def test_two_processes(tmp_path):
  outputs = two_processes.run(_CHILD, tmp_path)
  peaks = [int(out.split('done ')[1]) for out in outputs]
  assert max(peaks) <= 12_000
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    f'{i:08}' for i in range(8)
  ]
