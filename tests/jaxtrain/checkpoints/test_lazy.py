"""Lazy checkpoints are bit for bit what was given, while donation goes on."""

import threading
import time

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxtrain import train_state as train_state_lib
from jaxtrain.checkpoints import lazy
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import restore_params
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_STEPS = 12
_CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=4,
  mlp_dim=32,
  max_seq_len=32,
)


def _values(step, size=2**18):
  rng = np.random.default_rng(3)
  w = rng.standard_normal((size // 256, 256)).astype(np.float32)
  for _ in range(step):  # As the device does it: rounded at each step.
    w = w + np.float32(1)
  return {'w': w, 'b': np.full(7, step, np.float32), 's': np.float32(step)}


def _state(step=0):
  mesh = jax.make_mesh((2, 4), ('a', 'b'))
  specs = {'w': P('b'), 'b': P(), 's': P()}
  params = {
    name: jax.device_put(value, NamedSharding(mesh, specs[name]))
    for name, value in _values(step).items()
  }
  return {'params': params, 'rng': jax.random.key(3), 'n': np.arange(3)}


@jax.jit
def _add(params):
  return jax.tree.map(lambda x: x + 1, params)


_add_in_place = jax.jit(_add, donate_argnums=0)


@pytest.mark.parametrize('budget', [None, 2**20 // 2, 2**20])
def test_every_checkpoint_is_whole_while_its_state_is_donated(budget, tmp_path):
  # w of 1 MiB is alone above the smallest budget.
  gib = None if budget is None else budget / 2**30
  state = _state()
  with CheckpointManager(
    tmp_path, keep=None, saving='lazy', staging_gib=gib
  ) as manager:
    if budget == 2**20 // 2:
      with pytest.raises(ValueError, match='params/w takes 0.000977 GiB'):
        manager.save(0, state)
      assert manager.should_save(0) and manager.all_steps() == []
      return
    for step in range(_STEPS):
      assert manager.save(step, state, data_state={'step': step})
      assert not manager.save(step, state)
      manager.wait_copied()
      state['params'] = _add_in_place(state['params'])
      state['n'] += 1  # The caller's own.
    manager.wait()
    area = manager._lazy.staging
    assert area.used_bytes == 0 and manager.blocked_s > 0
    if budget:
      assert area.peak_bytes <= budget
    assert manager.all_steps() == list(range(_STEPS))
    for step in range(_STEPS):
      found, data_state, _ = manager.restore(_state(), step)
      jax.tree.map(
        np.testing.assert_array_equal, found['params'], _values(step)
      )
      np.testing.assert_array_equal(found['n'], np.arange(3) + step)
      assert found['rng'] == jax.random.key(3) and data_state['step'] == step


def test_what_is_on_disk_is_what_orbax_writes(tmp_path):
  files, metadata = {}, {}
  for saving in ('async', 'lazy'):
    with CheckpointManager(tmp_path / saving, saving=saving) as manager:
      manager.save(3, _state(), metadata={'a': 1})
      manager.wait()
      folder = tmp_path / saving / '00000003'
      # Data files have random names.
      files[saving] = {
        str(p.relative_to(folder))
        for p in folder.rglob('*')
        if p.parent.name != 'd'
      }
      metadata[saving] = (folder / 'state' / '_METADATA').read_text()
      # Orbax alone, told nothing, finds arrays of the devices.
      plain = ocp.PyTreeCheckpointer().restore(folder / 'state')
      assert plain['params']['w'].sharding.memory_kind == 'device'
      np.testing.assert_array_equal(plain['params']['w'], _values(0)['w'])
  assert files['lazy'] == files['async']
  leave_out = lambda text: {
    k for k in text.replace('"', ' ').split() if not k[0].isdigit()
  }
  assert leave_out(metadata['lazy']) == leave_out(metadata['async'])


def test_serving_reads_the_parameters(tmp_path):
  mesh = make_mesh('fsdp=2,tensor=4')
  model, tx = Transformer(_CONFIG), optax.adamw(1e-3)
  state = train_state_lib.init_state(model, tx, mesh, PRESETS['default'])
  wanted = jax.device_get(state.params)
  with CheckpointManager(tmp_path, saving='lazy') as manager:
    manager.save(1, vars(state), config=_CONFIG)
  config, found = restore_params(tmp_path, mesh, PRESETS['default'])
  assert config == _CONFIG
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('surface', ['save', 'wait', 'close'])
def test_what_fails_in_the_background_surfaces(surface, tmp_path):
  manager = CheckpointManager(tmp_path, saving='lazy')
  manager.save(1, _state())
  manager.wait()
  # As root may write anywhere: the folder becomes a file.
  moved = tmp_path.parent / f'{tmp_path.name}_moved'
  tmp_path.rename(moved)
  tmp_path.write_text('in the way')
  manager.save(2, _state())
  manager.wait_copied()  # Training goes on.
  while any(t.is_alive() for t in manager._lazy._flushes):
    time.sleep(0.01)
  with pytest.raises(OSError, match='00000002'):
    if surface == 'save':
      manager.save(3, _state())
    else:
      getattr(manager, surface)()
  assert manager._lazy.staging.used_bytes == 0
  tmp_path.unlink()
  moved.rename(tmp_path)
  if surface == 'close':
    return
  # With the disk mended, saving goes on, of the failed step too.
  assert manager.save(2, _state(2))
  manager.close()
  with CheckpointManager(tmp_path) as again:
    assert again.all_steps() == [1, 2]
    found, _, _ = again.restore(_state())
    np.testing.assert_array_equal(found['params']['w'], _values(2)['w'])


def test_at_most_one_save_waits_for_the_one_at_work():
  writer = lazy.LazyWriter()
  order, gate = [], [False]

  def write(tree):
    while not gate[0]:
      time.sleep(0.01)
    order.append(len(order))

  for _ in range(2):
    writer.save({'x': jax.numpy.ones(3)}, write)
  assert writer.blocked_s < 5 and not order
  third = threading.Thread(
    target=lambda: writer.save({'x': jax.numpy.ones(3)}, write)
  )
  third.start()
  third.join(0.3)
  assert third.is_alive()  # Until the first is written.
  gate[0] = True
  third.join(10)
  writer.wait()
  assert order == [0, 1, 2] and writer.blocked_s > 0.2


def test_wrong_staging_memory(tmp_path):
  with pytest.raises(ValueError, match='staging_gib=-1 must be positive'):
    CheckpointManager(tmp_path, saving='lazy', staging_gib=-1)
  with pytest.raises(ValueError, match="saving='eager'"):
    CheckpointManager(tmp_path, saving='eager')
