"""The binary plans, writes what training and serving read, spares the rest."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint_conversion
from experiments import configs
from experiments import training
from jaxtrain import train_state
from jaxtrain.checkpoints import manager as manager_lib
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_ROOT = pathlib.Path(__file__).parents[2]

_RULES = PRESETS['default']
_LAMB = 'optimizer={"name": "lamb"}'


def _abstract(overrides=(), mesh='fsdp=2,tensor=2'):
  config = configs.load('byte_stdlib_tiny', overrides)
  model, tx = training.model_and_optimizer(**config)
  spec = train_state.state_spec(model, tx, make_mesh(mesh), _RULES)
  return config, vars(spec.abstract)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A checkpoint of the tiny config with numbers in order, and its state."""
  folder = tmp_path_factory.mktemp('source') / 'checkpoints'
  config, target = _abstract()
  fill = lambda x: jax.device_put(
    np.arange(3, 3 + x.size).astype(x.dtype).reshape(x.shape), x.sharding
  )
  state = jax.tree.map(fill, target)
  with CheckpointManager(folder) as manager:
    for step in (3, 6):
      manager.save(
        step,
        state,
        config=config['model'],
        data_state={'at': step},
        metadata={'tokenizer': 'byte'},
      )
  return folder, state


def _assert_equal(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_converted_checkpoint_is_one_like_any_other(tmp_path, saved):
  source, state = saved
  target = tmp_path / 'run' / 'checkpoints'
  checkpoint_conversion.run(source, target, step=3, mesh='fsdp=4')
  with CheckpointManager(target) as manager:
    assert manager.all_steps() == [3]
    found, data_state, metadata = manager.restore(_abstract(mesh='')[1])
  _assert_equal(found, state)
  assert (data_state, metadata) == ({'at': 3}, {'tokenizer': 'byte'})
  with pytest.raises(ValueError, match='nothing is overwritten'):
    checkpoint_conversion.run(source, target)


def test_parameters_alone_in_another_dtype_are_served(tmp_path, saved):
  source, state = saved
  plan = checkpoint_conversion.run(
    source, tmp_path / 'x', dtype='bfloat16', params_only=True
  )
  assert all(r.target.startswith('params/') for r in plan.rows if r.target)
  config, params = manager_lib.restore_params(
    tmp_path / 'x', make_mesh('tensor=2'), _RULES
  )
  assert config.vocab_size == 264
  as_half = lambda x: np.asarray(x).astype(jnp.bfloat16)
  _assert_equal(params, jax.tree.map(as_half, state['params']))


def test_parameters_do_not_need_the_data_states_to_agree(tmp_path, saved):
  copy = tmp_path / 'copy'
  shutil.copytree(saved[0], copy)
  folder = copy / '00000006' / 'data'
  (folder / 'process_0-of-1.json').unlink()
  (copy / '00000006' / 'files.json').unlink()
  for i in range(2):
    (folder / f'process_{i}-of-2.json').write_text(f'{{"at": {i}}}')
  with pytest.raises(
    ValueError, match='data states of 2 processes, which diff'
  ):
    checkpoint_conversion.run(copy, tmp_path / 'x')
  assert not (tmp_path / 'x').exists()
  checkpoint_conversion.run(copy, tmp_path / 'x', params_only=True)


def test_another_optimizer_and_vocabulary(tmp_path, saved):
  source, state = saved
  overrides = [_LAMB, 'model.vocab_size=320', 'seed=1']
  config, target = _abstract(overrides, mesh='tensor=2')
  rules = [
    {'rule': 'pad', 'from': 'embed/embedding', 'dim': 0, 'size': 320},
    {'rule': 'pad', 'from': 'unembed/kernel', 'dim': 1, 'size': 320},
    {'rule': 'optimizer'},
    {'rule': 'drop', 'from': '/rng'},
    {'rule': 'init', 'from': '/rng'},
  ]
  checkpoint_conversion.run(source, tmp_path / 'x', rules, config=config)
  with CheckpointManager(tmp_path / 'x') as manager:
    found, _, _ = manager.restore(target)
  old, new = state['opt_state'][0], found['opt_state'][0]
  wide = np.pad(old.nu['unembed']['kernel'], [(0, 0), (0, 56)])
  np.testing.assert_array_equal(new.nu['unembed']['kernel'], wide)
  assert int(new.count) == 3 and int(found['step']) == 3
  _, run_key = jax.random.split(jax.random.key(1, impl='threefry2x32'))
  np.testing.assert_array_equal(found['rng'], jax.random.key_data(run_key))
  # The same in the words of the stored architecture.
  checkpoint_conversion.run(
    source, tmp_path / 'y', rules[:2], model=['vocab_size=320']
  )
  assert manager_lib.read_config(tmp_path / 'y')[0].vocab_size == 320
  with pytest.raises(ValueError, match='embedding has shape .320, 32., wanted'):
    checkpoint_conversion.run(source, None, rules[:2])


def test_a_config_begins_with_another_runs_checkpoint(tmp_path, saved):
  source, state = saved
  overrides = [_LAMB, 'mesh=tensor=2', 'eval_batches=0', 'steps=3']
  config, _ = _abstract([*overrides, 'schedule.num_steps=100'])
  initial = {'directory': str(source), 'rules': [{'rule': 'optimizer'}]}
  result = training.run(
    tmp_path, **config, initial=initial | {'step': 6}, progress=False
  )
  # There was nothing left to do; the numbers in order begin with 3.
  assert result.step == 3 and not result.history
  _assert_equal(
    jax.tree.map(np.asarray, result.state.params),
    jax.tree.map(np.asarray, state['params']),
  )
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    assert manager.all_steps() == [3]
  with pytest.raises(ValueError, match="'initial' needs a workdir"):
    training.run(None, **config, initial=initial)
  with pytest.raises(ValueError, match="'initial' has unknown rule; known"):
    training.run(tmp_path, **config, initial=initial | {'rule': []})


def _binary(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.convert_checkpoint', *arguments],
    cwd=_ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_a_dry_run_prints_and_writes_nothing(tmp_path, saved):
  source, _ = saved
  file = tmp_path / 'rules.py'
  file.write_text("RULES = [{'rule': 'optimizer'}]\n")
  done = _binary(
    f'--source={source}',
    f'--rules={file}',
    '--config=byte_stdlib_tiny',
    f'--override={_LAMB}',
    '--dry_run',
  )
  assert done.returncode == 0, done.stderr[-2000:]
  printed = done.stdout.splitlines()
  assert 'step 6' in printed[0] and '40 leaves' in printed[0]
  lines = [line.split() for line in printed]
  name = 'opt_state/0/nu/final_norm/scale'
  row = f'{name} {name} nu carried float32[32] float32[32] 128'
  assert row.split() in lines
  assert [p.name for p in tmp_path.iterdir()] == ['rules.py']


def test_wrong_use_is_named(tmp_path, saved):
  source, _ = saved
  read = checkpoint_conversion.read_rules
  file = tmp_path / 'rules.json'
  file.write_text(json.dumps([{'rule': 'drop', 'from': 'x'}]))
  assert read(str(file)) == [{'rule': 'drop', 'from': 'x'}]
  with pytest.raises(ValueError, match='rules are not JSON'):
    read('[{')
  with pytest.raises(ValueError, match='no rules at .*none.py'):
    read(str(tmp_path / 'none.py'))
  with pytest.raises(ValueError, match='is not field=json; fields: vocab_size'):
    checkpoint_conversion.run(source, None, model=['size=3'])
  with pytest.raises(ValueError, match="dtype='int8' is not one of float32"):
    checkpoint_conversion.run(source, None, dtype='int8')
  done = _binary(f'--source={source}')
  assert done.returncode == 1
  assert 'either --target or --dry_run' in done.stderr
