"""Inferred rules against Megatron's, written by hand, and against one device.

Trees have the names and shapes of the Flax models of Hugging Face. Letters:
D model, F feed-forward, V vocab, as in the models.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import infer_rules
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding.partition import path_name
from jaxtrain.sharding.redco import partition

_D, _F, _V = 16, 64, 96
_OUT, _IN, _WHOLE = P(None, 'tensor'), P('tensor', None), P(None, None)
_SPLIT, _KEPT = P('tensor'), P(None)


def _linear(name, d_in, d_out, spec, bias=None):
  """One layer: {path: (shape, expected spec)}."""
  tree = {f'{name}/kernel': ((d_in, d_out), spec)}
  if bias is not None:
    tree[f'{name}/bias'] = ((d_out,), bias)
  return tree


def _many(prefix, names, d_in, d_out, spec, bias=None):
  tree = {}
  for name in names.split():
    tree |= _linear(f'{prefix}/{name}', d_in, d_out, spec, bias)
  return tree


def _table(name, rows, spec, width=_D):
  return {f'{name}/embedding': ((rows, width), spec)}


def _gptj():
  tree = _table('transformer/wte', _V, _IN)
  tree |= _linear('lm_head', _D, _V, _OUT, _SPLIT)
  for i in range(2):
    block = f'transformer/h/{i}'
    tree |= _many(f'{block}/attn', 'q_proj k_proj v_proj', _D, _D, _OUT)
    tree |= _linear(f'{block}/attn/out_proj', _D, _D, _IN)
    tree |= _linear(f'{block}/mlp/fc_in', _D, _F, _OUT, _SPLIT)
    tree |= _linear(f'{block}/mlp/fc_out', _F, _D, _IN, _KEPT)
    tree |= {f'{block}/ln_1/{n}': ((_D,), _KEPT) for n in ('scale', 'bias')}
  return tree


def _llama(kv_width=8):
  tree = _table('model/embed_tokens', _V, _IN)
  tree |= _linear('lm_head', _D, _V, _OUT)
  for i in range(2):
    block = f'model/layers/{i}'
    tree |= _linear(f'{block}/self_attn/q_proj', _D, _D, _OUT)
    tree |= _many(f'{block}/self_attn', 'k_proj v_proj', _D, kv_width, _OUT)
    tree |= _linear(f'{block}/self_attn/o_proj', _D, _D, _IN)
    tree |= _many(f'{block}/mlp', 'gate_proj up_proj', _D, _F, _OUT)
    tree |= _linear(f'{block}/mlp/down_proj', _F, _D, _IN)
    tree |= {f'{block}/input_layernorm/weight': ((_D,), _KEPT)}
  return tree


def _mixtral():
  tree = {p: s for p, s in _llama().items() if '/mlp/' not in p}
  moe = 'model/layers/0/block_sparse_moe'
  tree |= _linear(f'{moe}/gate', _D, 4, _WHOLE)
  for i in range(4):
    tree |= _many(f'{moe}/experts/{i}', 'w1 w3', _D, _F, _OUT)
    tree |= _linear(f'{moe}/experts/{i}/w2', _F, _D, _IN)
  return tree


def _t5(inner=24):
  tree = _table('shared', _V, _IN) | _linear('lm_head', _D, _V, _OUT)
  layer = 'encoder/block/0/layer'
  tree |= _table(
    f'{layer}/0/SelfAttention/relative_attention_bias', 32, _WHOLE, 4
  )
  for name in (
    f'{layer}/0/SelfAttention',
    'decoder/block/0/layer/0/SelfAttention',
    'decoder/block/0/layer/1/EncDecAttention',
  ):
    tree |= _many(name, 'q k v', _D, inner, _OUT)
    tree |= _linear(f'{name}/o', inner, _D, _IN)
  tree |= {f'{layer}/0/layer_norm/weight': ((_D,), _KEPT)}
  tree |= _many(f'{layer}/1/DenseReluDense', 'wi_0 wi_1', _D, _F, _OUT)
  tree |= _linear(f'{layer}/1/DenseReluDense/wo', _F, _D, _IN)
  tree |= _linear('decoder/block/0/layer/2/DenseReluDense/wi', _D, _F, _OUT)
  tree |= _linear('decoder/block/0/layer/2/DenseReluDense/wo', _F, _D, _IN)
  return tree


def _opt():
  tree = _table('model/decoder/embed_tokens', _V, _IN)
  tree |= _table('model/decoder/embed_positions', 34, _WHOLE)
  for i in range(2):
    block = f'model/decoder/layers/{i}'
    names = 'q_proj k_proj v_proj'
    tree |= _many(f'{block}/self_attn', names, _D, _D, _OUT, _SPLIT)
    tree |= _linear(f'{block}/self_attn/out_proj', _D, _D, _IN, _KEPT)
    tree |= _linear(f'{block}/fc1', _D, _F, _OUT, _SPLIT)
    tree |= _linear(f'{block}/fc2', _F, _D, _IN, _KEPT)
    tree |= {f'{block}/final_layer_norm/scale': ((_D,), _KEPT)}
  return tree


def _bert():
  tree = _table('bert/embeddings/word_embeddings', _V, _IN)
  tree |= _table('bert/embeddings/position_embeddings', 32, _WHOLE)
  tree |= _table('bert/embeddings/token_type_embeddings', 2, _WHOLE)
  block = 'bert/encoder/layer/0'
  names = 'query key value'
  tree |= _many(f'{block}/attention/self', names, _D, _D, _OUT, _SPLIT)
  tree |= _linear(f'{block}/attention/output/dense', _D, _D, _IN, _KEPT)
  tree |= {f'{block}/attention/output/LayerNorm/scale': ((_D,), _KEPT)}
  tree |= _linear(f'{block}/intermediate/dense', _D, _F, _OUT, _SPLIT)
  tree |= _linear(f'{block}/output/dense', _F, _D, _IN, _KEPT)
  tree |= _linear('bert/pooler/dense', _D, _D, _WHOLE, _KEPT)
  tree |= _linear('cls/predictions/transform/dense', _D, _D, _WHOLE, _KEPT)
  tree |= _linear('cls/seq_relationship', _D, 2, _WHOLE, _KEPT)
  return tree


def _neox():
  tree = _table('gpt_neox/embed_in', _V, _IN)
  tree |= _linear('embed_out', _D, _V, _OUT)
  for i in range(2):
    block = f'gpt_neox/layers/{i}'
    name = f'{block}/attention/query_key_value'
    tree |= _linear(name, _D, 3 * _D, _OUT, _SPLIT)
    tree |= _linear(f'{block}/attention/dense', _D, _D, _IN, _KEPT)
    tree |= _linear(f'{block}/mlp/dense_h_to_4h', _D, _F, _OUT, _SPLIT)
    tree |= _linear(f'{block}/mlp/dense_4h_to_h', _F, _D, _IN, _KEPT)
  return tree


_TREES = dict(
  gptj=_gptj(),
  llama=_llama(),
  llama_multi_head=_llama(kv_width=_D),
  mixtral=_mixtral(),
  t5=_t5(),
  t5_square=_t5(inner=_D),
  opt=_opt(),
  bert=_bert(),
  neox=_neox(),
)


@pytest.mark.parametrize('name', _TREES)
def test_specs_are_megatrons(name):
  tree = _TREES[name]
  specs = partition({p: shape for p, (shape, _) in tree.items()}, 2, 'tensor')
  wrong = {p: s for p, s in specs.items() if s != tree[p][1]}
  assert list(specs) == list(tree) and not wrong


@pytest.mark.parametrize('num_shards', [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize('name', _TREES)
def test_every_spec_divides(name, num_shards):
  shapes = {p: shape for p, (shape, _) in _TREES[name].items()}
  for path, spec in partition(shapes, num_shards, 'expert').items():
    assert len(spec) == len(shapes[path])
    for size, axis in zip(shapes[path], spec, strict=True):
      assert axis is None or (axis == 'expert' and size % num_shards == 0)


def test_group_is_whole_where_its_width_does_not_divide():
  specs = partition(
    {
      'attn/q/kernel': (16, 3, 8),
      'attn/k/kernel': (16, 2, 8),
      'attn/out/kernel': (3, 8, 16),
      'mlp/up/kernel': (16, 6),
      'mlp/down/kernel': (6, 16),
    },
    2,
    'tensor',
  )
  assert all(s == P(None, None, None) for p, s in specs.items() if 'attn' in p)
  assert specs['mlp/up/kernel'] == _OUT


def test_plain_layers_alternate():
  sizes = [10, 64, 32, 64, 10, 10]
  shapes = {
    f'Dense_{i}/kernel': pair
    for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))
  }
  specs = partition(shapes, 2, 'tensor')
  assert list(specs.values()) == [_OUT, _IN, _OUT, _IN, _WHOLE]


_SMALL = dict(
  vocab_size=96,
  embed_dim=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=64,
  max_seq_len=32,
)
_CONFIGS = dict(
  llama=ModelConfig(**_SMALL),
  tied=ModelConfig(**_SMALL, tie_embeddings=True),
  multi_head=ModelConfig(**_SMALL | dict(num_kv_heads=4)),
  qwen2=ModelConfig(**_SMALL, qkv_bias=True),
  gemma=ModelConfig(**_SMALL, qk_norm=True, post_norms=True),
  mixtral=ModelConfig(**_SMALL, moe=MoE(4, 2, 32)),
  qwen3_moe=ModelConfig(**_SMALL, qk_norm=True, moe=MoE(8, 2, 24)),
  square=ModelConfig(**_SMALL | dict(num_heads=2, head_dim=16, mlp_dim=32)),
)


def _boxed(config):
  return jax.eval_shape(
    lambda key: Transformer(config).init(key, jnp.zeros((1, 4), jnp.int32)),
    jax.random.key(0),
  )['params']


@pytest.mark.parametrize('name', _CONFIGS)
def test_own_model_gets_the_specs_of_its_annotations(name):
  boxed = _boxed(_CONFIGS[name])
  rules = PRESETS['tensor_parallel'].replace(expert=None)
  annotated = jax.tree_util.tree_leaves_with_path(
    nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, P)
  )
  inferred = infer_rules(boxed, 2)
  assert len(annotated) == len(inferred)
  for path, logical in annotated:
    spec = inferred[path_name(path)]
    expected = tuple(rules.spec(tuple(logical)))
    assert spec == P(*expected, *(None,) * (len(spec) - len(expected))), path


class _Attention(nn.Module):
  names: tuple[str, ...]
  kv_width: int

  @nn.compact
  def __call__(self, x):
    q, k, v, out = self.names
    dense = functools.partial(nn.Dense, use_bias=False)
    heads = lambda y: y.reshape(*y.shape[:2], -1, 4)
    y = jax.nn.dot_product_attention(
      heads(dense(x.shape[-1], name=q)(x)),
      heads(dense(self.kv_width, name=k)(x)),
      heads(dense(self.kv_width, name=v)(x)),
      is_causal=True,
    )
    return dense(x.shape[-1], name=out)(y.reshape(x.shape))


class _MLP(nn.Module):
  gated: bool

  @nn.compact
  def __call__(self, x):
    if not self.gated:
      y = nn.gelu(nn.Dense(64, name='fc_in')(x))
      return nn.Dense(x.shape[-1], name='fc_out')(y)
    dense = functools.partial(nn.Dense, use_bias=False)
    y = nn.silu(dense(64, name='gate_proj')(x)) * dense(64, name='up_proj')(x)
    return dense(x.shape[-1], name='down_proj')(y)


class _Block(nn.Module):
  llama: bool

  @nn.compact
  def __call__(self, x):
    if self.llama:
      names = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
      y = nn.RMSNorm(name='input_layernorm')(x)
      x = x + _Attention(names, 16, name='self_attn')(y)
      y = nn.RMSNorm(name='post_attention_layernorm')(x)
      return x + _MLP(True, name='mlp')(y)
    names = ('q_proj', 'k_proj', 'v_proj', 'out_proj')
    y = nn.LayerNorm(name='ln_1')(x)
    x = x + _Attention(names, 32, name='attn')(y)
    return x + _MLP(False, name='mlp')(nn.LayerNorm(name='ln_2')(x))


class _Decoder(nn.Module):
  """A decoder nobody annotated: LLaMA's, or GPT-J's with serial layers."""

  llama: bool
  num_layers: int

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(96, 32, name='embed_tokens')(tokens)
    for i in range(self.num_layers):
      x = _Block(self.llama, name=f'layers_{i}')(x)
    x = nn.LayerNorm(name='ln_f')(x)
    return nn.Dense(96, use_bias=False, name='lm_head')(x)


def _megatron(path):
  """Megatron-LM's split of `_Decoder`, by hand."""
  name = path_name(path)
  layer, leaf = name.split('/')[-2:]
  if layer == 'embed_tokens':
    return _IN
  if layer in ('o_proj', 'out_proj', 'down_proj', 'fc_out'):
    return P() if leaf == 'bias' else _IN
  if layer.endswith('_proj') or layer in ('fc_in', 'lm_head'):
    return _SPLIT if leaf == 'bias' else _OUT
  return P()


def _run(model, params, tokens, mesh, spec_of):
  """Logits on the mesh, and how many all-reduces the program has."""
  shardings = jax.tree_util.tree_map_with_path(
    lambda path, _: NamedSharding(mesh, spec_of(path)), params
  )
  batch = NamedSharding(mesh, P('data'))
  out = NamedSharding(mesh, P('data', None, 'tensor'))
  forward = jax.jit(
    lambda p, t: model.apply({'params': p}, t),
    in_shardings=(shardings, batch),
    out_shardings=out,
  )
  args = jax.device_put(params, shardings), jax.device_put(tokens, batch)
  text = forward.lower(*args).compile().as_text()
  return forward(*args), text.count(' all-reduce(')


@pytest.mark.parametrize('llama', [False, True], ids=['gptj', 'llama'])
def test_forward_is_one_devices_with_megatrons_collectives(llama):
  mesh = make_mesh('data=2,tensor=4')
  tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 96)
  counts = []
  for num_layers in (1, 3):
    model = _Decoder(llama, num_layers)
    params = model.init(jax.random.key(0), tokens)['params']
    specs = infer_rules(params, 4)
    inferred = lambda path, specs=specs: specs[path_name(path)]
    logits, count = _run(model, params, tokens, mesh, inferred)
    assert count == _run(model, params, tokens, mesh, _megatron)[1]
    np.testing.assert_allclose(
      logits, model.apply({'params': params}, tokens), rtol=1e-4, atol=1e-5
    )
    counts.append(count)
  assert counts[1] - counts[0] == 2 * 2, counts


@pytest.mark.parametrize(
  'given, message',
  [
    (dict(axis='tp'), "unknown mesh axis 'tp'"),
    (dict(num_shards=0), 'num_shards=0 must be at least 1'),
    (dict(params={'ln': {'scale': np.ones(4)}}), 'ln/scale'),
    (dict(params={}), 'no parameter is a matrix'),
  ],
)
def test_wrong_input_is_named(given, message):
  params = {'up': {'kernel': np.ones((4, 8))}}
  with pytest.raises(ValueError, match=message):
    infer_rules(**dict(params=params, num_shards=2) | given)
