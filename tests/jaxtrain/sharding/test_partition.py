"""Arrays and parameter trees under sharding rules."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import named_sharding
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding import unsharded
from jaxtrain.sharding.partition import fit_rules
from jaxtrain.sharding.partition import init_sharded
from jaxtrain.sharding.partition import path_name
from jaxtrain.sharding.partition import shard_heads

_CONFIG = ModelConfig(
  vocab_size=48,
  embed_dim=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=40,
  max_seq_len=16,
)


def _init(key):
  return Transformer(_CONFIG).init(key, jnp.zeros((1, 4), jnp.int32))['params']


@pytest.fixture(scope='module')
def mesh():
  return make_mesh('data=2,fsdp=2,tensor=2')


def test_init_sharded_is_init_born_on_its_shards(mesh, monkeypatch):
  rules, key, programs, jit = PRESETS['default'], jax.random.key(3), [], jax.jit

  def spy(f, **kwargs):
    jitted = jit(f, **kwargs)

    def call(*args):
      programs.append(jitted.lower(*args).compile().as_text())
      return jitted(*args)

    return call

  monkeypatch.setattr(jax, 'jit', spy)
  params = init_sharded(_init, mesh, rules, key)
  monkeypatch.undo()
  whole = nn.unbox(jax.jit(_init)(key))
  assert jax.tree.structure(params) == jax.tree.structure(whole)
  # The same random bits; XLA may round their inverse erf by shape of the shard.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, whole
  )
  expected = param_shardings(jax.eval_shape(_init, key), mesh, rules)
  same = jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, expected
  )
  assert all(jax.tree.leaves(same))
  up = params['layers']['mlp']['up']['kernel']
  assert {s.data.shape for s in up.addressable_shards} == {(2, 8, 20)}
  # No device ever holds the 2 x 16 x 40 kernel, nor one layer of it.
  (text,) = programs
  assert '8,20]' in text and '16,40]' not in text


def test_constrainer_pins_the_activation(mesh):
  rules = PRESETS['default']
  shard = constrainer(mesh, rules)
  x = jnp.arange(8 * 4 * 6.0).reshape(8, 4, 6)
  y = jax.jit(lambda x: shard(x * 2, 'batch', 'seq', 'act_mlp'))(x)
  assert y.sharding.spec[0] == ('data', 'fsdp')
  assert {s.data.shape for s in y.addressable_shards} == {(2, 4, 3)}
  np.testing.assert_array_equal(y, x * 2)


def test_constrainer_of_one_device_does_nothing():
  rules = PRESETS['default']
  assert constrainer(None, rules) is unsharded
  assert constrainer(make_mesh(''), rules) is unsharded
  x = object()
  assert unsharded(x, 'batch') is x


def test_constrainers_are_values(mesh):
  a = constrainer(mesh, PRESETS['fsdp'])
  b = constrainer(make_mesh('data=2,fsdp=2,tensor=2'), PRESETS['fsdp'])
  assert a == b and hash(a) == hash(b)
  assert a != constrainer(mesh, PRESETS['default'])


def test_named_sharding(mesh):
  s = named_sharding(mesh, PRESETS['default'], 'batch', None, 'act_heads')
  assert s.mesh == mesh
  assert s.spec == P(('data', 'fsdp', 'expert'), None, 'tensor')


def test_param_shardings_of_a_scalar_and_an_unnamed_leaf(mesh):
  boxed = {
    'count': jax.ShapeDtypeStruct((), jnp.int32),
    'plain': jax.ShapeDtypeStruct((3, 5), jnp.float32),
    'named': nn.LogicallyPartitioned(
      jax.ShapeDtypeStruct((4, 6), jnp.float32), ('embed', 'mlp')
    ),
  }
  s = param_shardings(boxed, mesh, PRESETS['default'])
  assert s['count'].spec == P()
  assert s['plain'].is_fully_replicated
  assert s['named'].spec == P('fsdp', 'tensor')


def test_param_used_twice_is_refused(mesh):
  rules = ShardingRules(embed='tensor', mlp='tensor')
  with pytest.raises(ValueError, match="'tensor' is used twice"):
    param_shardings(jax.eval_shape(_init, jax.random.key(0)), mesh, rules)


def test_fit_rules_replicates_only_what_does_not_divide():
  boxed = jax.eval_shape(_init, jax.random.key(0))
  mesh, rules = make_mesh('fsdp=2,tensor=4'), PRESETS['default']
  fitted = fit_rules(boxed, mesh, rules)
  changed = {n for n in rules.table if fitted.table[n] != rules.table[n]}
  assert changed == {'kv_heads', 'act_kv_heads'}
  assert all(fitted.table[n] == () for n in changed)
  param_shardings(boxed, mesh, fitted)
  same = fit_rules(boxed, make_mesh('fsdp=2,tensor=2'), rules)
  assert same == rules


def test_shard_heads_gives_each_device_its_own_heads(mesh):
  seen = []

  def run(x, tree):
    seen.append((x.shape, tree['a'].shape))
    return x + tree['a'][:, None], tree['a']

  x, tree = jnp.arange(12.0).reshape(3, 4), {'a': jnp.arange(3.0)}
  shard = constrainer(mesh, PRESETS['default'])
  axes = ((None, 'act_heads'), ())
  y, a = shard_heads(run, shard, in_axes=axes, out_axes=axes)(x, tree)
  np.testing.assert_array_equal(y, x + tree['a'][:, None])
  np.testing.assert_array_equal(a, tree['a'])
  assert set(seen) == {((3, 2), (3,))}
  assert shard_heads(run, unsharded, axes, axes) is run


def test_path_name():
  tree = {'a': [1, {'b': 2}]}
  paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
  assert paths == ['a/0', 'a/1/b']
