"""Other trees, other optimizers, and training and serving go on from them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import optimizers
from jaxtrain import train_state
from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints import manager as manager_lib
from jaxtrain.checkpoints import remap
from jaxtrain.checkpoints import stored
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_RULES = PRESETS['default']
_CONFIG = ModelConfig(
  vocab_size=40,
  embed_dim=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=32,
  max_seq_len=16,
)
_D, _N, _K, _H = 16, 4, 2, 4
_UNSTACK = {'rule': 'unstack', 'from': 'layers/(.*)', 'to': r'h/{i}/\1'}


def _random(tree, seed=0):
  """Arrays for shapes: normal, positive second moments; counts are 3."""
  rng = np.random.default_rng(seed)

  def one(path, x):
    value = np.full(x.shape, 3, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating):
      value = rng.normal(size=x.shape).astype(x.dtype)
      value = np.abs(value) if 'nu' in str(path) else value
    return jax.device_put(value, x.sharding)

  return jax.tree_util.tree_map_with_path(one, tree)


def _abstract(tx, mesh):
  model = Transformer(_CONFIG)
  return vars(
    train_state.state_spec(model, tx, make_mesh(mesh), _RULES).abstract
  )


@functools.cache
def _adamw():
  return optimizers.get('adamw')(optax.linear_schedule(0.1, 0.0, 50))


@pytest.fixture(scope='module')
def saved_state():
  return _random(_abstract(_adamw(), 'fsdp=2,tensor=2'))


@pytest.fixture(scope='module')
def saved(tmp_path_factory, saved_state):
  """A checkpoint with random moments; counts and step are 3."""
  folder = tmp_path_factory.mktemp('saved')
  with CheckpointManager(folder) as manager:
    manager.save(
      3,
      saved_state,
      data_state={'position': 3},
      config=_CONFIG,
      metadata={'tokenizer': 'byte'},
    )
  return folder


def _assert_equal(found, wanted):
  found, wanted = abstract.leaves(found), abstract.leaves(wanted)
  assert found.keys() == wanted.keys()
  for name, x in found.items():
    np.testing.assert_array_equal(x, wanted[name], err_msg=name)


def _convert(source, target, rules, mesh='', config=_CONFIG):
  with stored.open_checkpoint(source) as checkpoint:
    plan = remap.plan(checkpoint.leaves, rules, where=checkpoint.where)
    wanted = convert.target_of(
      checkpoint, plan, make_mesh(mesh), _RULES, config
    )
    data_state = checkpoint.read_data_state()
    convert.write(
      checkpoint, plan, wanted, target, config, data_state=data_state
    )
  return plan


def test_unstacked_and_stacked_again_training_goes_on(
  tmp_path, saved, saved_state
):
  there = _convert(saved, tmp_path / 'there', [_UNSTACK], 'data=4', None)
  with stored.open_checkpoint(tmp_path / 'there') as checkpoint:
    assert 'opt_state/0/nu/h/2/mlp/up/kernel' in checkpoint.leaves
    assert not [n for n in checkpoint.leaves if 'layers' in n]
    with pytest.raises(ValueError, match='was saved without a model config'):
      manager_lib.read_config(tmp_path / 'there')
  _convert(tmp_path / 'there', tmp_path / 'back', there.inverse(), 'fsdp=4')
  target = _abstract(_adamw(), 'data=2,tensor=2')
  with CheckpointManager(tmp_path / 'back') as manager:
    state, data_state, metadata = manager.restore(target)
  assert jax.tree.structure(state) == jax.tree.structure(saved_state)
  _assert_equal(state, saved_state)
  assert data_state == {'position': 3} and metadata == {'tokenizer': 'byte'}
  config, params = manager_lib.restore_params(
    tmp_path / 'back', make_mesh('tensor=2'), _RULES, param_dtype=jnp.bfloat16
  )
  assert config == _CONFIG
  want = jax.tree.map(
    lambda x: np.asarray(x).astype(jnp.bfloat16), saved_state['params']
  )
  _assert_equal(params, want)


def test_nothing_is_overwritten(tmp_path, saved):
  with pytest.raises(ValueError, match='is there already'):
    _convert(saved, saved, [])
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is there already'):
    _convert(saved, tmp_path / 'file', [])


def test_parameters_that_the_model_has_not_are_named(tmp_path, saved):
  with pytest.raises(ValueError, match='does not fit .*lacks params/layers'):
    _convert(saved, tmp_path / 'x', [_UNSTACK])


def _foreign(params):
  """The parameters as another program has them: by layer, qkv by kv head."""
  tree = {'wte': params['embed']['embedding'], 'ln_f': {'g': None}}
  tree['ln_f']['g'] = params['final_norm']['scale']
  tree['lm_head'] = np.asarray(params['unembed']['kernel']).T
  layers = jax.tree.map(np.asarray, params['layers'])
  for i in range(_CONFIG.num_layers):
    layer = jax.tree.map(lambda x: x[i], layers)
    a, m = layer['attention'], layer['mlp']
    runs = []
    for k in range(_K):
      own = slice(k * _N // _K, (k + 1) * _N // _K)
      runs.append(a['query']['kernel'][:, own].reshape(_D, -1))
      runs += [a[n]['kernel'][:, k] for n in ('key', 'value')]
    tree[f'h{i}'] = {
      'ln_1': {'g': layer['pre_attention_norm']['scale']},
      'ln_2': {'g': layer['pre_mlp_norm']['scale']},
      'qkv': np.concatenate(runs, 1),
      'proj': a['out']['kernel'].reshape(_N * _H, _D).T,
      'gate_up': np.concatenate([m['gate']['kernel'], m['up']['kernel']], 1).T,
      'down': m['down']['kernel'],
    }
  return tree


_FROM_FOREIGN = [
  {'rule': 'rename', 'from': '/model/(.*)', 'to': r'/params/\1'},
  {'rule': 'stack', 'from': 'h{i}/(.*)', 'to': r'layers/\1'},
  {
    'rule': 'split',
    'from': 'layers/qkv',
    'to': [f'layers/attention/{n}/kernel' for n in ('query', 'key', 'value')],
    'sizes': [_N * _H, _K * _H, _K * _H],
    'dim': 2,
    'groups': _K,
  },
  {
    'rule': 'reshape',
    'from': 'layers/attention/.*/kernel',
    'shape': [_CONFIG.num_layers, _D, -1, _H],
  },
  {'rule': 'transpose', 'from': 'layers/(proj|gate_up)', 'order': [0, 2, 1]},
  {'rule': 'transpose', 'from': 'lm_head', 'order': [1, 0]},
  {
    'rule': 'reshape',
    'from': 'layers/proj',
    'shape': [_CONFIG.num_layers, _N, _H, _D],
  },
  {
    'rule': 'split',
    'from': 'layers/gate_up',
    'to': ['layers/mlp/gate/kernel', 'layers/mlp/up/kernel'],
    'sizes': [32, 32],
    'dim': 2,
  },
  {
    'rule': 'rename',
    'from': 'layers/proj',
    'to': 'layers/attention/out/kernel',
  },
  {'rule': 'rename', 'from': 'layers/down', 'to': 'layers/mlp/down/kernel'},
  {
    'rule': 'rename',
    'from': 'layers/ln_1/g',
    'to': 'layers/pre_attention_norm/scale',
  },
  {
    'rule': 'rename',
    'from': 'layers/ln_2/g',
    'to': 'layers/pre_mlp_norm/scale',
  },
  {'rule': 'rename', 'from': 'wte', 'to': 'embed/embedding'},
  {'rule': 'rename', 'from': 'lm_head', 'to': 'unembed/kernel'},
  {'rule': 'rename', 'from': 'ln_f/g', 'to': 'final_norm/scale'},
]


def test_a_foreign_model_with_fused_qkv_gives_the_same_logits(
  tmp_path, saved_state
):
  params = jax.tree.map(np.asarray, saved_state['params'])
  with CheckpointManager(tmp_path / 'foreign') as manager:
    manager.save(1, {'model': _foreign(params)})
  plan = _convert(
    tmp_path / 'foreign', tmp_path / 'ours', _FROM_FOREIGN, 'tensor=2,fsdp=2'
  )
  assert plan.inverse()
  _, found = manager_lib.restore_params(
    tmp_path / 'ours', make_mesh('tensor=2'), _RULES
  )
  logits = _logits(_CONFIG, params)
  np.testing.assert_array_equal(_logits(_CONFIG, found), logits)
  assert np.ptp(logits) > 0.1


def _logits(config, params):
  tokens = jnp.arange(12).reshape(1, 12)
  params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
  return jax.jit(Transformer(config).apply)({'params': params}, tokens)[0]


def test_training_starts_from_another_tree(tmp_path, saved_state):
  """A new state takes the parameters; all that it lacks is that of a seed."""
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, {'model': _foreign(saved_state['params'])})
  target = _abstract(_adamw(), 'fsdp=2,data=2')
  fresh = _random(target, seed=1)
  rules = [
    *_FROM_FOREIGN,
    {'rule': 'init', 'from': '/(opt_state/.*|step|rng)'},
  ]
  state = convert.restore(tmp_path, rules, target, new=lambda: fresh)
  _assert_equal(state, fresh | {'params': saved_state['params']})
  with pytest.raises(ValueError, match='is new, and there is no state'):
    convert.restore(tmp_path, rules, target)


def test_lamb_goes_on_with_the_moments_of_adamw(tmp_path):
  lr, b1, b2, eps, decay = 0.01, 0.9, 0.999, 1e-6, 0.1
  adamw = optimizers.get('adamw')(optax.constant_schedule(1e-3))
  lamb = optimizers.get('lamb')(
    lambda step: lr / (step + 1.0), b1=b1, b2=b2, eps=eps, weight_decay=decay
  )
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  new = lambda: {'layers': {'w': {'kernel': draw(2, 3, 4)}}, 'b': draw(5)}
  params, grads = new(), [new() for _ in range(3)]
  old = adamw.init(params)
  for g in grads[:2]:
    _, old = jax.jit(adamw.update)(g, old, params)
  with CheckpointManager(tmp_path) as manager:
    manager.save(2, {'params': params, 'opt_state': old})
  target = {'params': params, 'opt_state': lamb.init(params)}
  state = convert.restore(tmp_path, [{'rule': 'optimizer'}], target)
  updates, _ = jax.jit(lamb.update)(
    grads[2], state['opt_state'], state['params']
  )

  def expected(w, g1, g2, g3, dims, has_decay):
    w, *grads = (np.asarray(x, np.float64) for x in (w, g1, g2, g3))
    m = v = 0.0
    for g in grads:
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    r = m / (1 - b1**3) / (np.sqrt(v / (1 - b2**3)) + eps)
    r = r + decay * w if has_decay else r
    norm = lambda x: np.sqrt(np.sum(x * x, axis=dims, keepdims=True))
    return -lr / 3 * norm(w) / norm(r) * r  # The schedule has seen two.

  at = lambda t: (t['layers']['w']['kernel'], t['b'])
  moved = [at(t) for t in (params, *grads)]
  for found, arrays, dims in zip(
    at(updates), zip(*moved, strict=True), [(1, 2), (0,)], strict=True
  ):
    want = expected(*arrays, dims, has_decay=len(dims) == 2)
    error = np.sqrt(np.mean((found - want) ** 2) / np.mean(want**2))
    assert error < 1e-5


def _optimizer_plan(saved, tx, rule):
  with stored.open_checkpoint(saved) as checkpoint:
    return remap.plan(
      checkpoint.leaves, [rule], _abstract(tx, ''), checkpoint.where
    )


def test_what_is_carried_and_what_is_new_is_said(saved, saved_state):
  lion = optax.lion(1e-3)
  plan = _optimizer_plan(saved, lion, {'rule': 'optimizer'})
  rows = {row.target: row for row in plan.rows if row.target}
  left = [row.sources[0].name for row in plan.rows if not row.target]
  assert rows['opt_state/0/mu/final_norm/scale'].how == ('mu carried',)
  assert rows['opt_state/0/count'].how == ('count of opt_state/0',)
  assert 'opt_state/0/nu/final_norm/scale' in left
  assert all('/nu/' in n or n == 'opt_state/2/count' for n in left)
  assert 'left out by rule 1 (optimizer)' in plan.table()
  # A sum is not a mean: only with the factor that makes one of the other.
  sgd = optax.sgd(1e-3, momentum=0.9)
  rows = _optimizer_plan(saved, sgd, {'rule': 'optimizer'}).rows
  assert {r.how for r in rows if r.target.startswith('opt')} == {('new',)}
  rule = {'rule': 'optimizer', 'carry': {'mu': None}}
  plan = _optimizer_plan(saved, _adamw(), rule)
  new = [row.target for row in plan.rows if row.how == ('new',)]
  assert new and all('/mu/' in name for name in new)
  rule = {'rule': 'optimizer', 'carry': {'trace': ['mu', 10.0]}}
  state = convert.restore(saved, [rule], _abstract(sgd, ''))
  jax.tree.map(
    lambda x, mu: np.testing.assert_allclose(x, 10 * np.asarray(mu), 1e-6),
    state['opt_state'][0].trace,
    saved_state['opt_state'][0].mu,
  )


def test_counts_of_layers_are_those_of_the_whole(saved, saved_state):
  # Has its moments by stack, with a count for each layer.
  tx = optimizers.get('optax.lamb')(1e-3)
  target = _abstract(tx, 'fsdp=2')
  rule = {'rule': 'optimizer'}
  state = convert.restore(saved, [rule], target)
  inner = state['opt_state'].stacked['3'][0]
  np.testing.assert_array_equal(inner.count, [3, 3, 3])
  np.testing.assert_array_equal(
    inner.mu['layers']['mlp']['up']['kernel'],
    saved_state['opt_state'][0].mu['layers']['mlp']['up']['kernel'],
  )
  assert state['opt_state'].rest[0].count == 3


def test_a_padded_vocabulary_trains_on(tmp_path, saved, saved_state):
  rules = [
    {'rule': 'pad', 'from': 'embed/embedding', 'dim': 0, 'multiple': 64},
    {'rule': 'pad', 'from': 'unembed/kernel', 'dim': 1, 'multiple': 64},
  ]
  config = dataclasses.replace(_CONFIG, vocab_size=64)
  plan = _convert(saved, tmp_path / 'wide', rules, 'fsdp=8', config)
  _, params = manager_lib.restore_params(
    tmp_path / 'wide', make_mesh('tensor=2'), _RULES
  )
  wide, narrow = (
    _logits(config, params),
    _logits(_CONFIG, saved_state['params']),
  )
  np.testing.assert_allclose(wide[..., :40], narrow, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(wide[..., 40:], 0)
  _convert(tmp_path / 'wide', tmp_path / 'narrow', plan.inverse(), 'tensor=2')
  with CheckpointManager(tmp_path / 'narrow') as manager:
    state, _, _ = manager.restore(_abstract(_adamw(), ''))
  _assert_equal(state, saved_state)
