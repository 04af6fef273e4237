"""Checkpoints come back bit for bit, on any mesh, and damage is named."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints import manager as manager_lib
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import param_shardings

# After a failed read, the others that orbax had begun complain as they end.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

_ROOT = pathlib.Path(__file__).parents[3]
_RULES = PRESETS['default']
_MOMENTS = ('mu', 'nu')
_CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=4,
  mlp_dim=32,
  max_seq_len=32,
  layer_pattern=('sliding', 'full'),
  sliding_window=8,
)


def _state(spec, fill):
  """A training state on a mesh; `fill` makes a NumPy array from its shape."""
  mesh = make_mesh(spec)
  init = lambda key: Transformer(_CONFIG).init(key, jnp.zeros((1, 1), int))
  boxed = jax.eval_shape(init, jax.random.key(0))['params']
  shardings = param_shardings(boxed, mesh, _RULES)
  place = lambda p, s: jax.device_put(fill(p.shape).astype(p.dtype), s)
  params = jax.tree.map(place, nn.unbox(boxed), shardings)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  replicated = jax.sharding.NamedSharding(mesh, jax.P())
  has_moments = lambda s: hasattr(s, 'mu')

  def place_optimizer(s):
    if not has_moments(s):
      return place(s, replicated)
    moments = {
      k: jax.tree.map(place, getattr(s, k), shardings) for k in _MOMENTS
    }
    return s._replace(count=place(s.count, replicated), **moments)

  return {
    'params': params,
    'opt_state': jax.tree.map(
      place_optimizer, jax.eval_shape(tx.init, params), is_leaf=has_moments
    ),
    'step': jnp.int32(7),
    'rng': jax.random.key(5, impl='rbg'),
  }


@pytest.fixture(scope='module')
def saved_state():
  rng = np.random.default_rng(0)
  fill = lambda shape: np.asarray(rng.normal(size=shape))
  return _state('data=2,fsdp=2,tensor=2', fill)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, saved_state):
  """A folder with steps 1, 2 and 3. Copied, not written to, by the tests."""
  folder = tmp_path_factory.mktemp('checkpoints')
  with CheckpointManager(folder) as manager:
    for step in (1, 2, 3):
      assert manager.save(
        step,
        saved_state,
        data_state={'position': [step, None]},
        config=_CONFIG,
        metadata={'tokenizer': 'byte'},
      )
  return folder


def _zeros(spec):
  return _state(spec, np.zeros)


def _bits(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def _assert_equal(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)

  def one(x, want):
    assert x.dtype == want.dtype
    np.testing.assert_array_equal(_bits(x), _bits(want))

  jax.tree.map(one, tree, expected)


@pytest.mark.parametrize('spec', ['tensor=4', ''])
def test_restores_on_another_mesh(saved, saved_state, spec):
  target = _zeros(spec)
  with CheckpointManager(saved) as manager:
    state, data_state, metadata = manager.restore(target)
  _assert_equal(state, saved_state)
  jax.tree.map(lambda x, t: _assert_same_sharding(x, t), state, target)
  assert data_state == {'position': [3, None]}
  assert metadata == {'tokenizer': 'byte'}
  # The key goes on where it stopped.
  _assert_equal(
    jax.random.bits(state['rng'], (4,)),
    jax.random.bits(saved_state['rng'], (4,)),
  )


def _assert_same_sharding(x, target):
  assert x.sharding.is_equivalent_to(target.sharding, x.ndim)


def test_shapes_are_enough_to_restore(saved, saved_state):
  target = jax.eval_shape(lambda: _zeros(''))
  target = jax.tree.map(
    lambda t, s: t.update(sharding=s.sharding), target, _zeros('tensor=2')
  )
  target['step'] = target['step'].update(sharding=None)
  with CheckpointManager(saved) as manager:
    state, data_state, _ = manager.restore(target, step=1)
  assert type(state['step']) is np.ndarray
  _assert_equal(state, saved_state)
  assert data_state == {'position': [1, None]}


@pytest.mark.parametrize('spec', ['tensor=4', '', None])
def test_serving_reads_the_parameters_alone(saved, saved_state, spec):
  mesh = None if spec is None else make_mesh(spec)
  rules = PRESETS['tensor_parallel']
  config, params = manager_lib.restore_params(saved, mesh, rules)
  assert config == _CONFIG
  _assert_equal(params, saved_state['params'])
  if spec == 'tensor=4':
    shard = params['layers']['mlp']['up']['kernel'].addressable_shards[0]
    assert shard.data.shape == (2, 16, 8)
  assert manager_lib.read_config(saved) == (_CONFIG, {'tokenizer': 'byte'})


def test_parameters_are_cast_when_asked(saved, saved_state):
  _, params = manager_lib.restore_params(
    saved, None, _RULES, step=2, param_dtype=jnp.bfloat16
  )
  expected = jax.tree.map(
    lambda x: np.asarray(x).astype(jnp.bfloat16), saved_state['params']
  )
  _assert_equal(params, expected)


def test_stored_dtype_is_kept(tmp_path, saved_state):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), saved_state['params'])
  with CheckpointManager(tmp_path) as manager:
    manager.save(0, {'params': params}, config=_CONFIG)
  _, restored = manager_lib.restore_params(tmp_path, None, _RULES)
  _assert_equal(restored, params)


def test_saves_every_n_steps_and_keeps_the_newest(tmp_path):
  state = {'params': {'w': jnp.arange(4.0)}}
  with CheckpointManager(tmp_path, keep=2, save_every_steps=10) as manager:
    assert manager.latest_step() is None
    assert [s for s in range(1, 41) if manager.save(s, state)] == [
      10,
      20,
      30,
      40,
    ]
    assert manager.save(43, state, force=True)
    assert not manager.save(43, state, force=True)
    assert not manager.should_save(43)
    manager.wait()
    assert manager.all_steps() == [40, 43]
    assert manager.latest_step() == 43
  assert sorted(p.name for p in tmp_path.iterdir()) == ['00000040', '00000043']


def test_buffers_may_be_donated_while_a_save_is_written(tmp_path):
  mesh = make_mesh('data=2,fsdp=4')
  spec = jax.sharding.NamedSharding(mesh, jax.P('fsdp'))
  step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
  x = jax.device_put(jnp.arange(2.0**20).reshape(1024, 1024), spec)
  x = step(x)
  expected = np.array(x)
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, {'params': x})
    for _ in range(3):
      old, x = x, step(x)
      assert old.is_deleted()
    restored, _, _ = manager.restore({'params': x})
  np.testing.assert_array_equal(restored['params'], expected)
  assert np.any(np.asarray(x) != expected)


def test_a_step_of_an_earlier_run_is_replaced(tmp_path):
  state = lambda v: {'params': {'w': jnp.full(4, v)}}
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, state(1.0))
    manager.save(2, state(2.0), data_state='old')
  with CheckpointManager(tmp_path) as manager:
    manager.restore(state(0.0), step=1)
    assert manager.save(2, state(3.0), data_state='new')
  with CheckpointManager(tmp_path) as manager:
    restored, data_state, _ = manager.restore(state(0.0))
  assert data_state == 'new'
  _assert_equal(restored, state(3.0))


_KILLED = """
import jax, jax.numpy as jnp, sys, time
from jaxtrain.checkpoints import file_list
from jaxtrain.checkpoints.manager import CheckpointManager
write = file_list.write
def stop_in_the_middle(folder):
  if folder.name.startswith('00000002'):
    print('in the middle', flush=True)
    time.sleep(600)
  write(folder)
file_list.write = stop_in_the_middle
manager = CheckpointManager(sys.argv[1])
for step in (1, 2):
  manager.save(step, {'params': {'w': jnp.full((64, 64), float(step))}})
time.sleep(600)
"""


def test_a_run_killed_while_saving_loses_nothing(tmp_path):
  child = subprocess.Popen(
    [sys.executable, '-c', _KILLED, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert child.stdout.readline() == 'in the middle\n'
  finally:
    child.kill()
    child.wait()
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names[0] == '00000001' and names[1].startswith('00000002.')
  state = {'params': {'w': jnp.zeros((64, 64))}}
  with CheckpointManager(tmp_path) as manager:
    assert manager.all_steps() == [1]
    with pytest.raises(ValueError, match='2 in .* was never finished.*step 1'):
      manager.restore(state, step=2)
    restored, _, _ = manager.restore(state)
    np.testing.assert_array_equal(restored['params']['w'], 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    manager.save(2, {'params': {'w': jnp.full((64, 64), 5.0)}})
    restored, _, _ = manager.restore(state)
    np.testing.assert_array_equal(restored['params']['w'], 5.0)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['00000001', '00000002']


def _files_of(step_folder):
  files = [p for p in step_folder.rglob('*') if p.is_file()]
  return sorted(p.relative_to(step_folder) for p in files)


def _damage(path, how):
  data = path.read_bytes()
  path.unlink()
  if how != 'deleted':
    path.write_bytes(data[: len(data) // 2] if how == 'halved' else b'')


@pytest.mark.parametrize(
  'how, listed',
  [
    ('deleted', True),
    ('halved', True),
    ('emptied', True),
    # As in an old checkpoint, without a list of its files.
    ('deleted', False),
    ('halved', False),
  ],
)
def test_damage_is_named_or_harmless(tmp_path, how, listed):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  noise = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
  saved_state = {'params': {'w': jnp.array(noise)}, 'rng': jax.random.key(1)}
  target = {'params': {'w': jnp.zeros((128, 256))}, 'rng': jax.random.key(0)}
  with CheckpointManager(whole) as manager:
    for step in (1, 2, 3):
      manager.save(step, saved_state, data_state='d', metadata={'m': step})
  if not listed:
    (whole / '00000003' / 'files.json').unlink()
    meta = whole / '00000003' / 'meta' / 'metadata'
    meta.write_text(meta.read_text().replace('"listed"', '"not_listed"'))
  num_refused = 0
  for name in _files_of(whole / '00000003'):
    shutil.copytree(whole, broken)
    _damage(broken / '00000003' / name, how)
    with CheckpointManager(broken) as manager:
      try:
        state, data_state, metadata = manager.restore(target)
      except ValueError as e:
        num_refused += 1
        assert f'checkpoint step 3 in {broken} is damaged (' in str(e)
        assert str(e).endswith('; use step 2 or 1')
        if listed and len(name.parts) > 1:
          assert str(name) in str(e)
      else:
        assert not listed or len(name.parts) == 1  # The others are listed.
        _assert_equal(state, saved_state)
        assert (data_state, metadata) == ('d', {'m': 3})
    shutil.rmtree(broken)
  assert num_refused >= 5


def test_serving_names_damage_too(tmp_path, saved):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  (tmp_path / '00000003' / 'state' / 'manifest.ocdbt').unlink()
  with pytest.raises(ValueError, match='manifest.ocdbt is missing.*step 2'):
    manager_lib.restore_params(tmp_path, None, _RULES)
  config, _ = manager_lib.restore_params(tmp_path, None, _RULES, step=2)
  assert config == _CONFIG


def test_a_damaged_step_is_replaced_when_the_run_gets_there(tmp_path):
  state = {'params': {'w': jnp.ones(4)}}
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, state)
    manager.save(2, state)
  shutil.rmtree(tmp_path / '00000002' / 'state')
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(ValueError, match='is damaged .* use step 1'):
      manager.restore(state)
    manager.restore(state, step=1)
    manager.save(2, state)
    _assert_equal(manager.restore(state)[0], state)


def test_a_failed_save_is_raised_and_can_be_repeated(tmp_path, monkeypatch):
  def full(folder):
    raise OSError('disk is full')

  state = {'params': {'w': jnp.ones(4)}}
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, state)
    manager.wait()
    monkeypatch.setattr(file_list, 'write', full)
    manager.save(2, state)
    with pytest.raises(OSError, match='disk is full'):
      manager.wait()
    assert manager.latest_step() == 1
    monkeypatch.undo()
    assert manager.save(2, state)
    _assert_equal(manager.restore(state, step=2)[0], state)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda s: s.pop('rng'), 'it also has rng$'),
    (lambda s: s.update(ema=jnp.ones(3)), 'it lacks ema$'),
    (lambda s: s.update(step=jnp.float32(1)), 'step is int32, wanted float32'),
    (
      lambda s: s['params']['final_norm'].update(scale=jnp.ones(8)),
      r'params/final_norm/scale has shape \(16,\), wanted \(8,\)',
    ),
    (lambda s: s.pop('opt_state'), r'it also has opt_state/.* and \d+ more'),
  ],
)
def test_a_state_that_does_not_fit_is_named(saved, change, message):
  target = _zeros('')
  change(target)
  with CheckpointManager(saved) as manager:
    with pytest.raises(ValueError, match=f'3 in .* does not fit .*{message}'):
      manager.restore(target)


def test_wrong_use_is_named(tmp_path, saved):
  state = {'params': jnp.ones(2)}
  with pytest.raises(ValueError, match='keep=0 must be at least 1'):
    CheckpointManager(tmp_path, keep=0)
  with pytest.raises(ValueError, match='save_every_steps=0 must be'):
    CheckpointManager(tmp_path, save_every_steps=0)
  with CheckpointManager(tmp_path) as manager:
    with pytest.raises(ValueError, match=f'no checkpoint in {tmp_path}'):
      manager.restore(state)
    with pytest.raises(ValueError, match='step=-1 is negative'):
      manager.save(-1, state)
    with pytest.raises(ValueError, match='data_state is not JSON'):
      manager.save(1, state, data_state=np.int64(3))
    with pytest.raises(ValueError, match='metadata is not JSON'):
      manager.save(1, state, metadata={'a': {1}})
    manager.save(1, state)
  with CheckpointManager(saved) as manager:
    with pytest.raises(ValueError, match='step 9 in .* does not exist; use'):
      manager.restore(state, step=9)
  for read in (
    lambda folder: manager_lib.restore_params(folder, None, _RULES),
    manager_lib.read_config,
  ):
    with pytest.raises(ValueError, match='was saved without a model config'):
      read(tmp_path)
    with pytest.raises(ValueError, match='no checkpoint in .*nowhere'):
      read(tmp_path / 'nowhere')
  assert not (tmp_path / 'nowhere').exists()


def test_a_mesh_that_does_not_divide_is_named(saved):
  with pytest.raises(ValueError, match='not divisible by 8'):
    manager_lib.restore_params(saved, make_mesh('tensor=8'), _RULES)


class _TupleState(NamedTuple):
  params: Any
  step: Any
  rest: Any


@flax.struct.dataclass
class _DataclassState:
  params: Any
  step: Any
  rest: Any


@pytest.mark.parametrize('container', [_TupleState, _DataclassState])
def test_any_container_and_leaf_comes_back(tmp_path, saved_state, container):
  rest = ({'none': None, 'empty': {}}, (), np.arange(3.0), 2.5, jnp.array(True))
  state = container(saved_state['params'], 3, rest)
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, state, config=_CONFIG)
    restored, _, _ = manager.restore(state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert type(restored.step) is int and restored.step == 3
  assert [type(x) for x in restored.rest] == [type(x) for x in rest]
  np.testing.assert_array_equal(restored.rest[2], rest[2])
  assert restored.rest[3:] == rest[3:]
  _, params = manager_lib.restore_params(tmp_path, None, _RULES)
  _assert_equal(params, saved_state['params'])


def test_relative_paths_work(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = {'params': jnp.ones(2)}
  with CheckpointManager('run/checkpoints') as manager:
    manager.save(1, state)
  assert (tmp_path / 'run' / 'checkpoints' / '00000001').is_dir()


def test_serving_loads_no_optimizer():
  code = """
    import sys
    from jaxtrain.checkpoints import manager
    assert not {'optax', 'grain', 'tokenizers'} & set(sys.modules)
  """
  subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    check=True,
    timeout=120,
  )
