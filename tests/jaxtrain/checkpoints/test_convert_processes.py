"""One process saves and two convert, then the reverse; data state too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import make_mesh
from tests.jaxtrain.checkpoints import two_processes

_SHAPE = (4, 16, 8)
_CHILD = """
source, target = arguments
import jax.numpy as jnp, numpy as np
from jaxtrain.checkpoints import convert, remap, stored
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import PRESETS, make_mesh

mesh = make_mesh('fsdp=4,tensor=2')
sharding = jax.sharding.NamedSharding(mesh, jax.P('tensor', 'fsdp'))
whole = jax.sharding.NamedSharding(mesh, jax.P())
shape = lambda s, how, dtype=jnp.float32: jax.ShapeDtypeStruct(
  s, dtype, sharding=how)
# As it is: what one process saved, on the devices of two.
plain = {
  'params': {'layers': {'w': shape((4, 16, 8), whole)}},
  'step': shape((), whole, jnp.int32),
}
with CheckpointManager(source) as manager:
  state, data, _ = manager.restore(plain)
assert data == {'position': 5}, data
assert int(state['step'].addressable_data(0)) == 5
# Layers apart, each on shards of all eight devices.
rules = [
  {'rule': 'unstack', 'from': 'layers/w', 'to': 'layers/{i}/w'},
  {'rule': 'cast', 'from': '.*', 'dtype': 'bfloat16'},
]
read = []
with stored.open_checkpoint(source) as checkpoint:
  plan = remap.plan(checkpoint.leaves, rules, where=checkpoint.where)
  target_tree = {
    'params': {'layers': {str(i): {'w': shape((16, 8), sharding, jnp.bfloat16)}
                          for i in range(4)}},
    'step': shape((), whole, jnp.int32),
  }
  convert.write(checkpoint, plan, target_tree, target, None,
                data_state=checkpoint.read_data_state(), on_read=read.append)
# A process reads the shards of its own four devices, half of each layer.
assert sum(read) == 4 * (16 * 8 * 2 // 2) + 4, read
print('done')
"""


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """What one process saved, and what two have made of it."""
  folder = tmp_path_factory.mktemp('processes')
  source, target = folder / 'one', folder / 'two'
  w = jnp.arange(512.0).reshape(_SHAPE)
  mesh = make_mesh('data=2,fsdp=4')
  by_row = jax.sharding.NamedSharding(mesh, jax.P(None, 'fsdp'))
  state = {'params': {'layers': {'w': jax.device_put(w, by_row)}}}
  with CheckpointManager(source) as manager:
    manager.save(5, state | {'step': jnp.int32(5)}, data_state={'position': 5})
  for out in two_processes.run(_CHILD, source, target):
    assert out.endswith('done\n')
  return source, target


def test_one_process_reads_what_two_made_of_what_one_saved(folders):
  source, target = folders
  mesh = make_mesh('tensor=8')
  sharding = jax.sharding.NamedSharding(mesh, jax.P(None, None, 'tensor'))
  wanted = {
    'params': {
      'layers': {
        'w': jax.ShapeDtypeStruct(_SHAPE, jnp.float32, sharding=sharding)
      }
    },
    'step': 0,
  }
  rules = [
    {'rule': 'stack', 'from': 'layers/{i}/w', 'to': 'layers/w'},
    {'rule': 'cast', 'from': '.*', 'dtype': 'float32'},
  ]
  state = convert.restore(target, rules, wanted)
  # Up to 255, integers are themselves in bfloat16.
  w = np.arange(512.0).reshape(_SHAPE)
  expected = w.astype(jnp.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(state['params']['layers']['w'], expected)
  assert state['step'] == 5
  plain = {
    'params': {
      'layers': {
        str(i): {'w': jnp.zeros((16, 8), jnp.bfloat16)} for i in range(4)
      }
    },
    'step': jnp.int32(0),
  }
  with CheckpointManager(target) as manager:
    state, data_state, _ = manager.restore(plain)
  assert data_state == {'position': 5}
  for i in range(4):
    found = state['params']['layers'][str(i)]['w']
    np.testing.assert_array_equal(found, w[i].astype(jnp.bfloat16))
