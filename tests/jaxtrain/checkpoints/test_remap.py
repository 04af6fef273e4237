"""Each rule is what NumPy makes of it, undoes itself, says what is wrong."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from jaxtrain.checkpoints import convert
from jaxtrain.checkpoints import remap
from jaxtrain.checkpoints import remap_language
from jaxtrain.checkpoints import remap_names
from jaxtrain.checkpoints import stored
from jaxtrain.checkpoints import views
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.sharding import make_mesh

_MOMENTS = ('params', 'opt_state/0/mu', 'opt_state/0/nu')
_GQA = dict(groups=2, sizes=[8, 4, 4])  # 4 query and 2 kv heads of 2.


def _arrays(**shapes):
  """A state with moments: float32 parameters by name, and a count."""
  rng = np.random.default_rng(0)
  arrays = {
    f'{prefix}/{name}': rng.normal(size=shape).astype(np.float32)
    for prefix in _MOMENTS
    for name, shape in shapes.items()
  }
  return arrays | {'opt_state/0/count': np.int32(7)}


def _views(arrays):
  return {name: views.in_memory(name, x) for name, x in arrays.items()}


def _results(rules, leaves):
  plan = remap.plan(leaves, rules)
  return plan, {row.target: row.view for row in plan.rows if row.target}


def _values(made):
  return {name: v.read(views.whole(v.shape)) for name, v in made.items()}


def _check(rules, arrays, expected):
  """The rules make `expected(prefix, arrays of it)`, and can be undone."""
  plan, made = _results(rules, _views(arrays))
  wanted = {'opt_state/0/count': arrays['opt_state/0/count']}
  for prefix in _MOMENTS:
    own = {
      n.removeprefix(f'{prefix}/'): x
      for n, x in arrays.items()
      if n.startswith(f'{prefix}/')
    }
    wanted |= {f'{prefix}/{n}': x for n, x in expected(own).items()}
  _assert_same(_values(made), wanted)
  _, back = _results(plan.inverse(), made)
  _assert_same(_values(back), arrays)


def _assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, x in found.items():
    assert x.dtype == wanted[name].dtype, name
    np.testing.assert_array_equal(x, wanted[name], err_msg=name)


def test_rename_exchanges_names():
  rules = [
    {'rule': 'rename', 'from': '(a|b)/(.*)', 'to': r'\2/\1'},
    {'rule': 'rename', 'from': 'w/(.)', 'to': r'\1'},
  ]
  arrays = _arrays(**{'a/w': (2,), 'b/w': (3,), 'c': (2,)})
  _check(rules, arrays, lambda x: {'a': x['a/w'], 'b': x['b/w'], 'c': x['c']})
  swap = [
    {'rule': 'rename', 'from': 'a', 'to': 'tmp'},
    {'rule': 'rename', 'from': 'b', 'to': 'a'},
    {'rule': 'rename', 'from': 'tmp', 'to': 'b'},
  ]
  _check(swap, _arrays(a=(2,), b=(3,)), lambda x: {'a': x['b'], 'b': x['a']})


def test_stack_and_unstack_are_numpys():
  arrays = _arrays(**{f'layers/{i}/w/kernel': (3, 4) for i in range(11)})
  stack = {'rule': 'stack', 'from': 'layers/{i}/(.*)', 'to': r'layers/\1'}
  each = lambda x: [x[f'layers/{i}/w/kernel'] for i in range(11)]
  for dim in (0, 2):
    _check(
      [{**stack, 'dim': dim}],
      arrays,
      lambda x: {'layers/w/kernel': np.stack(each(x), dim)},
    )
  unstack = {'rule': 'unstack', 'from': '(.)/(.*)', 'to': r'\1.{i}/\2'}
  _check(
    [unstack | {'dim': 1}],
    _arrays(**{'h/w': (3, 2)}),
    lambda x: {'h.0/w': x['h/w'][:, 0], 'h.1/w': x['h/w'][:, 1]},
  )


def _qkv(x, dim=1):
  """Grouped heads, kv head by kv head: its queries, its key, its value."""
  out = []
  for g in range(2):
    out += [x['q'][:, g * 4 : g * 4 + 4], x['k'][:, g * 2 : g * 2 + 2]]
    out += [x['v'][:, g * 2 : g * 2 + 2]]
  return np.concatenate(out, dim)


def test_fuse_and_split_are_numpys():
  parts = dict(q=(3, 8), k=(3, 4), v=(3, 4))
  fuse = {'rule': 'fuse', 'from': ['q', 'k', 'v'], 'to': 'qkv', 'dim': 1}
  _check(
    [fuse],
    _arrays(**parts),
    lambda x: {'qkv': np.concatenate([x['q'], x['k'], x['v']], 1)},
  )
  _check([fuse | {'groups': 2}], _arrays(**parts), lambda x: {'qkv': _qkv(x)})
  split = {'rule': 'split', 'from': 'qkv', 'to': ['q', 'k', 'v'], 'dim': -1}

  def parts_of(x):
    runs = x['qkv'].reshape(3, 2, 8)
    cut = lambda a, b: runs[:, :, a:b].reshape(3, -1)
    return {'q': cut(0, 4), 'k': cut(4, 6), 'v': cut(6, 8)}

  _check([split | _GQA], _arrays(qkv=(3, 16)), parts_of)


def test_shapes_and_dtypes_are_numpys():
  arrays = _arrays(w=(3, 8), e=(5, 4))
  rules = [
    {'rule': 'transpose', 'from': 'w', 'order': [1, 0]},
    {'rule': 'reshape', 'from': 'w', 'shape': [2, -1, 3]},
    {'rule': 'pad', 'from': 'e', 'dim': 0, 'multiple': 4, 'value': 2.0},
    {'rule': 'pad', 'from': 'e', 'dim': 1, 'size': 6},
    {'rule': 'cast', 'from': '.*', 'dtype': 'float64'},
  ]

  def expected(x):
    e = np.pad(x['e'], [(0, 3), (0, 0)], constant_values=2.0)
    e = np.pad(e, [(0, 0), (0, 2)])
    w = x['w'].T.reshape(2, 4, 3)
    return {'w': w.astype(np.float64), 'e': e.astype(np.float64)}

  _check(rules, arrays, expected)


def test_what_is_lost_cannot_be_undone():
  arrays = _arrays(w=(3, 8), e=(5, 4))
  rules = [
    {'rule': 'cut', 'from': 'e', 'dim': 0, 'size': 2},
    {'rule': 'cast', 'from': 'w', 'dtype': 'bfloat16'},
    {'rule': 'drop', 'from': '/opt_state/0/nu/.*'},
  ]
  plan, made = _results(rules, _views(arrays))
  found = _values(made)
  np.testing.assert_array_equal(found['params/e'], arrays['params/e'][:2])
  rounded = arrays['params/w'].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(found['params/w'], rounded)
  assert not [name for name in made if '/nu/' in name]
  with pytest.raises(ValueError, match='cannot be undone: .*params/e'):
    plan.inverse()


def test_moments_of_another_dtype_keep_it():
  arrays = _arrays(w=(3, 8))
  arrays['params/w'] = arrays['params/w'].astype(ml_dtypes.bfloat16)
  rules = [{'rule': 'cast', 'from': 'w', 'dtype': 'float16'}]
  _, made = _results(rules, _views(arrays))
  assert made['params/w'].dtype == np.float16
  assert made['opt_state/0/mu/w'].dtype == np.float32


def test_codes_of_moments_are_not_moved():
  arrays = _arrays(w=(4, 8))
  arrays['opt_state/0/mu/w'] = np.zeros((4, 8), np.int8)
  rules = [{'rule': 'transpose', 'from': 'w', 'order': [1, 0]}]
  with pytest.raises(ValueError, match='mu/w holds codes .int8., which can'):
    remap.plan(_views(arrays), rules)
  remap.plan(_views(arrays), [{'rule': 'rename', 'from': 'w', 'to': 'x'}])


def test_mirrors_are_found_by_name_and_shape():
  shapes = {
    'params/a/w': (2, 3),
    'params/w': (3,),
    'opt_state/1/mu/a/w': (2, 3),
    'opt_state/1/nu/a/w': (2, 1),
    'opt_state/1/nu/w': (3,),
    'opt_state/0/count': (),
  }
  leaves = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
  assert remap_names.mirrors(leaves) == {
    'params/a/w': ('params', 'a/w'),
    'params/w': ('params', 'w'),
    'opt_state/1/mu/a/w': ('opt_state/1/mu', 'a/w'),
    'opt_state/1/nu/w': ('opt_state/1/nu', 'w'),
  }


def test_every_fault_is_named_at_once_and_nothing_is_read():
  def refuse(index):
    raise AssertionError('read')

  leaves = {
    f'params/{name}': views.Stored(name, shape, np.dtype('f4'), refuse)
    for name, shape in dict(
      a=(4,), b=(4,), q=(2, 3), k=(3, 3), qkv=(2, 9), m0=(2,), m2=(2,), z=(1,)
    ).items()
  }
  rules = [
    {'rule': 'rename', 'from': 'none', 'to': 'x'},
    {'rule': 'rename', 'from': 'a', 'to': 'b'},
    {'rule': 'fuse', 'from': ['q', 'k'], 'to': 'qk', 'dim': 1},
    {
      'rule': 'split',
      'from': 'qkv',
      'to': ['x', 'y'],
      'sizes': [4, 4],
      'dim': 1,
    },
    {'rule': 'stack', 'from': 'm{i}', 'to': 'm'},
    {'rule': 'init', 'from': '/step'},
  ]
  target = {
    'params': {
      'b': jax.ShapeDtypeStruct((5,), jnp.float32),
      'new': jax.ShapeDtypeStruct((7, 2), jnp.float32),
    },
    'step': jnp.int32(0),
  }
  with pytest.raises(ValueError) as e:
    remap.plan(leaves, rules, target, 'checkpoint 3')
  message = str(e.value)
  for text in (
    'checkpoint 3 does not become what is wanted',
    "rule 1 (rename): nothing matches 'none'",
    'rule 2 (rename): writes params/b, which the checkpoint has written',
    'rule 3 (fuse): params/qk: q is float32[2, 3], but k is float32[3, 3]',
    'params/qkv: has shape (2, 9), but parts of (4, 4) need (2, 8)',
    'rule 5 (stack): params/m: layers [1] of 3 are missing',
    'lacks params/new (7, 2)',
    'has left over params/z (1,)',
    'params/b has shape (4,), wanted (5,)',
  ):
    assert text in message
  assert len(message.splitlines()) == 9


@pytest.mark.parametrize(
  'rule, message',
  [
    ({'rule': 'mend'}, "'rule' is not one of rename, drop"),
    ({'rule': 'rename', 'from': 'a'}, 'lacks to'),
    ({'rule': 'drop', 'from': 'a', 'by': 1}, 'unknown by; allowed: from'),
    ({'rule': 'drop', 'from': '('}, 'not a regular expression'),
    ({'rule': 'rename', 'from': 'a', 'to': r'\1'}, 'needs 1 groups'),
    ({'rule': 'rename', 'from': 'a', 'to': '/b'}, "both begin with '/'"),
    ({'rule': 'stack', 'from': 'a', 'to': 'b'}, "'from' lacks {i}"),
    ({'rule': 'unstack', 'from': 'a', 'to': 'b'}, "'to' lacks {i}"),
    ({'rule': 'pad', 'from': 'a', 'dim': 0}, 'one of'),
    ({'rule': 'optimizer', 'carry': {'mu': 3}}, "carry of 'mu' is no name"),
    ({'rule': 'pad', 'from': 'a', 'dim': 'x', 'size': 2}, "dim='x' is not"),
    ({'rule': 'cast', 'from': 'a', 'dtype': 'int8'}, 'not a dtype of floats'),
    (
      {'rule': 'split', 'from': 'a', 'to': ['b'], 'sizes': [1, 2]},
      '1 names for 2 sizes',
    ),
  ],
)
def test_rules_that_make_no_sense_are_named(rule, message):
  good = {'rule': 'drop', 'from': 'a'}
  with pytest.raises(ValueError, match=re.escape(message)) as e:
    remap_language.parse([good, rule, {'rule': 'no'}])
  assert 'rule 2' in str(e.value) and 'rule 3' in str(e.value)


def _saved(folder, arrays):
  tree = {'params': {}, 'opt_state': ({'mu': {}, 'nu': {}}, None)}
  for name, x in arrays.items():
    *words, last = name.removeprefix('opt_state/0/').split('/')
    node = tree if words[:1] == ['params'] else tree['opt_state'][0]
    for word in words:
      node = node.setdefault(word, {})
    node[last] = jnp.asarray(x)
  with CheckpointManager(folder) as manager:
    manager.save(4, tree, data_state={'position': 4})
  return tree


def test_shards_read_from_files_are_those_of_the_whole(tmp_path):
  arrays = _arrays(q=(4, 8), k=(4, 4), v=(4, 4), e=(6, 4))
  _saved(tmp_path / 'c', arrays)
  rules = [
    {
      'rule': 'fuse',
      'from': ['q', 'k', 'v'],
      'to': 'qkv',
      'dim': 1,
      'groups': 2,
    },
    {'rule': 'pad', 'from': 'e', 'dim': 0, 'multiple': 8},
    {'rule': 'cast', 'from': '.*', 'dtype': 'bfloat16'},
  ]
  mesh = make_mesh('fsdp=4,tensor=2')
  sharding = jax.sharding.NamedSharding(mesh, jax.P('fsdp', 'tensor'))
  shape = lambda *size: jax.ShapeDtypeStruct(
    size, jnp.bfloat16, sharding=sharding
  )
  own = lambda: {'qkv': shape(4, 16), 'e': shape(8, 4)}
  target = {
    'params': own(),
    'opt_state': ({'mu': own(), 'nu': own(), 'count': 0}, None),
  }
  state = convert.restore(tmp_path / 'c', rules, target)
  assert jax.tree.structure(state) == jax.tree.structure(target)
  assert state['opt_state'][0]['count'] == 7
  bf16 = ml_dtypes.bfloat16
  for prefix, found in (
    ('params', state['params']),
    ('opt_state/0/nu', state['opt_state'][0]['nu']),
  ):
    own = {n: arrays[f'{prefix}/{n}'] for n in 'qkve'}
    assert found['qkv'].sharding == sharding
    np.testing.assert_array_equal(found['qkv'], _qkv(own).astype(bf16))
    padded = np.pad(own['e'], [(0, 2), (0, 0)]).astype(bf16)
    np.testing.assert_array_equal(found['e'], padded)
  with pytest.raises(ValueError, match='params/e is float32, wanted bfloat16'):
    convert.restore(tmp_path / 'c', rules[:2], target)


def test_each_process_would_read_its_rectangles_only(tmp_path):
  mesh = make_mesh('fsdp=8')
  by_row = jax.sharding.NamedSharding(mesh, jax.P('fsdp'))
  x = jax.device_put(jnp.arange(64.0 * 4).reshape(64, 4), by_row)
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, {'params': {'w': x}})
  with stored.open_checkpoint(tmp_path) as checkpoint:
    plan = remap.plan(checkpoint.leaves, [])
    target = {'params': {'w': jax.ShapeDtypeStruct((64, 4), jnp.float32)}}
    parts = []
    other = make_mesh('fsdp=2,data=4')
    target['params']['w'] = target['params']['w'].update(
      sharding=jax.sharding.NamedSharding(other, jax.P('fsdp'))
    )
    state = remap.read(plan, target, on_read=parts.append)
  assert parts == [512, 512]  # Two shards, each once, not one for each replica.
  np.testing.assert_array_equal(state['params']['w'], x)


def test_new_leaves_and_their_moments_are_the_new_states(tmp_path):
  arrays = _arrays(w=(3,))
  tree = _saved(tmp_path / 'c', arrays)
  key = jax.random.key(5, impl='rbg')
  with CheckpointManager(tmp_path / 'c') as manager:
    manager.save(5, tree | {'rng': key})
  target = jax.tree.map(jnp.zeros_like, tree) | {
    'rng': jax.random.key(0, impl='rbg')
  }
  ones = jnp.ones(2)
  for part in (
    target['params'],
    *(target['opt_state'][0][m] for m in ('mu', 'nu')),
  ):
    part['new'] = ones
  rules = [{'rule': 'init', 'from': 'new'}]
  state = convert.restore(tmp_path / 'c', rules, target, new=lambda: target)
  np.testing.assert_array_equal(state['opt_state'][0]['nu']['new'], ones)
  np.testing.assert_array_equal(state['params']['w'], arrays['params/w'])
  assert state['rng'] == key and state['opt_state'][0]['count'] == 7
  with pytest.raises(ValueError, match='lacks .*mu/new .2,., .*params/new'):
    convert.restore(tmp_path / 'c', [], target)
  rules = [{'rule': 'init', 'from': 'w'}]
  with pytest.raises(ValueError, match="has all of 'w'; drop it first"):
    convert.restore(tmp_path / 'c', rules, tree)


def test_two_leaves_of_one_rule_may_not_become_one():
  leaves = _views(_arrays(a=(2,), b=(2,)))
  rules = [{'rule': 'rename', 'from': '.', 'to': 'c'}]
  with pytest.raises(ValueError, match='writes params/c, which rule 1 .rename'):
    remap.plan(leaves, rules)
  rules = [{'rule': 'fuse', 'from': ['a', '.'], 'to': 'c'}]
  with pytest.raises(ValueError, match='params/c: a and b are the same part'):
    remap.plan(leaves, rules)
  rules = [{'rule': 'fuse', 'from': ['a', 'a'], 'to': 'c'}]
  with pytest.raises(ValueError, match='takes params/a twice'):
    remap.plan(leaves, rules)
  leaves = _views(_arrays(a0=(2,), b0=(2,)))
  rules = [{'rule': 'stack', 'from': '.{i}', 'to': 'c'}]
  with pytest.raises(ValueError, match='params/c: a0 and b0 are the same part'):
    remap.plan(leaves, rules)


def _bytes_read():
  name = '/tensorstore/kvstore/file/bytes_read'
  found = ts.experimental_collect_matching_metrics(name)
  return sum(v['value'] for metric in found for v in metric['values'])


def test_of_the_files_only_what_a_shard_needs_is_read(tmp_path):
  mesh = make_mesh('fsdp=8')
  by_row = jax.sharding.NamedSharding(mesh, jax.P(None, 'fsdp'))
  noise = np.random.default_rng(0).normal(size=(2, 512, 256))
  w = jax.device_put(noise.astype(np.float32), by_row)  # 1 MiB, incompressible.
  with CheckpointManager(tmp_path) as manager:
    manager.save(1, {'params': {'layers': {'w': w}}})
  rules = [{'rule': 'unstack', 'from': 'layers/w', 'to': '{i}'}]
  with stored.open_checkpoint(tmp_path) as checkpoint:
    plan = remap.plan(checkpoint.leaves, rules)
    start = _bytes_read()
    layer = next(r.view for r in plan.rows if r.target == 'params/1')
    assert _bytes_read() == start
    found = layer.read((slice(64, 128), slice(0, 256)))
    # A chunk is a shard of the mesh that saved, here of both layers.
    assert w.nbytes / 10 < _bytes_read() - start < w.nbytes / 6
  np.testing.assert_array_equal(found, np.asarray(w)[1, 64:128])


def test_damage_is_named(tmp_path):
  _saved(tmp_path / 'c', _arrays(w=(64, 64)))
  with stored.open_checkpoint(tmp_path / 'c') as checkpoint:
    plan = remap.plan(checkpoint.leaves, [])
    for file in (tmp_path / 'c' / '00000004' / 'state').rglob('d/*'):
      file.unlink()
    row = next(r for r in plan.rows if r.target == 'params/w')
    with pytest.raises(ValueError, match='step 4 in .*params/w cannot be read'):
      row.view.read(views.whole(row.shape))
  with pytest.raises(ValueError, match='is damaged'):
    with stored.open_checkpoint(tmp_path / 'c'):
      pass
