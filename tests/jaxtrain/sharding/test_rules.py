"""ShardingRules: specs, checks, and the presets on the real model."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding.partition import path_name


def test_spec():
  rules = ShardingRules(
    batch=('data', 'fsdp'), heads='tensor', embed=None, mlp=()
  )
  spec = rules.spec(('batch', None, 'heads', 'embed', 'mlp', 'vocab'))
  assert spec == P(('data', 'fsdp'), None, 'tensor', None, None, None)
  assert rules.spec(()) == P()


@pytest.mark.parametrize(
  'table, message',
  [
    (dict(head='tensor'), "unknown logical axis 'head'; known: batch, seq"),
    (dict(heads='model'), "heads=.*unknown mesh axis 'model'; known: stage"),
    (dict(batch=('data', 'data')), 'batch=.* uses a mesh axis twice'),
  ],
)
def test_wrong_rules_are_refused(table, message):
  with pytest.raises(ValueError, match=message):
    ShardingRules(**table)


def test_rule_used_twice_is_refused():
  rules = ShardingRules(embed='tensor', mlp='tensor')
  assert rules.spec(('embed', None)) == P('tensor', None)
  with pytest.raises(
    ValueError, match="'tensor' is used twice.*'embed' and by 'mlp'"
  ):
    rules.spec(('embed', 'mlp'))


def test_rules_are_values():
  a = ShardingRules(embed='fsdp', mlp='tensor')
  b = ShardingRules(mlp=('tensor',), embed=('fsdp',))
  c = a.replace(mlp=None)
  assert a == b and hash(a) == hash(b)
  assert a != c and c.table['mlp'] == () and a.table['mlp'] == ('tensor',)
  with pytest.raises(TypeError):
    a.table['mlp'] = ()
  with pytest.raises(AttributeError):
    a.table = {}
  with pytest.raises(ValueError, match='unknown logical axis'):
    a.replace(mlps='tensor')


def test_check_names_what_does_not_divide():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  rules = ShardingRules(batch=('data', 'fsdp'), mlp='tensor')
  rules.check(mesh, (8, 6), ('batch', 'mlp'))
  with pytest.raises(
    ValueError, match=r"x: dimension 'batch' of size 6 .* 4, .*'data', 'fsdp'"
  ):
    rules.check(mesh, (6, 6), ('batch', 'mlp'), 'x')
  with pytest.raises(ValueError, match='2 dimensions, but 1 are named'):
    rules.check(mesh, (8, 6), ('batch',))


_SIZES = dict(
  vocab_size=32,
  embed_dim=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  max_seq_len=16,
)
# Per logical axis of a parameter, by hand.
_EXPECTED = dict(
  default=dict(
    embed='fsdp',
    heads='tensor',
    kv_heads='tensor',
    mlp='tensor',
    vocab='tensor',
  ),
  data_parallel={},
  fsdp=dict(embed='fsdp'),
  tensor_parallel=dict(
    heads='tensor', kv_heads='tensor', mlp='tensor', vocab='tensor'
  ),
)
_PARAMS = {
  'embed/embedding': 'vocab embed',
  'layers/attention/query/kernel': 'layers embed heads head_dim',
  'layers/attention/query/bias': 'layers heads head_dim',
  'layers/attention/key/kernel': 'layers embed kv_heads head_dim',
  'layers/attention/out/kernel': 'layers heads head_dim embed',
  'layers/pre_mlp_norm/scale': 'layers -',
  'final_norm/scale': '-',
  'unembed/kernel': 'embed vocab',
}
_DENSE = {
  'layers/mlp/gate/kernel': 'layers embed mlp',
  'layers/mlp/down/kernel': 'layers mlp embed',
}
_MIXTURE = {
  'layers/moe/router/kernel': 'layers embed -',
  'layers/moe/up': 'layers expert embed mlp',
  'layers/moe/down': 'layers expert mlp embed',
}


def _specs(config, mesh, rules):
  boxed = jax.eval_shape(
    lambda key: Transformer(config).init(key, jnp.zeros((1, 4), jnp.int32)),
    jax.random.key(0),
  )['params']
  shardings = param_shardings(boxed, mesh, rules)
  shapes = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
  for (_, leaf), s in zip(shapes, jax.tree.leaves(shardings), strict=True):
    s.shard_shape(leaf.shape)
  return {
    path_name(path): s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(shardings)
  }


@pytest.mark.parametrize('moe', [None, MoE(4, 2, 24)], ids=['dense', 'moe'])
@pytest.mark.parametrize('name', PRESETS)
def test_presets_on_the_model(name, moe):
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  config = ModelConfig(**_SIZES, qkv_bias=True, moe=moe)
  specs = _specs(config, mesh, PRESETS[name])
  axes = dict(_EXPECTED[name])
  if name != 'data_parallel':
    axes['expert'] = 'expert'
  for path, logical in (_PARAMS | (_MIXTURE if moe else _DENSE)).items():
    assert specs[path] == P(*(axes.get(a) for a in logical.split())), path


def test_preset_that_does_not_divide_names_the_parameter():
  mesh = make_mesh('tensor=4')
  with pytest.raises(
    ValueError, match=r"layers/attention/key/kernel: dimension 'kv_heads' of"
  ):
    _specs(ModelConfig(**_SIZES), mesh, PRESETS['default'])
