"""What every published family owes: sizes, config.json and weight map."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxtrain.checkpoints import layout
from jaxtrain.models import families
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.config import Rope
from jaxtrain.models.families import base
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding.partition import path_name

# Number of parameters as the model pages on huggingface.co count them (those of
# the decoder alone for Gemma 3 4B: 64 unused rows more than llama.cpp's).
_PUBLISHED = {
  'llama2-7b': 6_738_415_616,
  'llama3-8b': 8_030_261_248,
  'llama3.1-8b': 8_030_261_248,
  'llama3.1-70b': 70_553_706_496,
  'llama3.2-1b': 1_235_814_400,
  'llama3.2-3b': 3_212_749_824,
  'mistral-7b-v0.1': 7_241_732_096,
  'mistral-7b-v0.3': 7_248_023_552,
  'qwen2.5-0.5b': 494_032_768,
  'qwen2.5-7b-instruct': 7_615_616_512,
  'qwen3-0.6b': 596_049_920,
  'qwen3-1.7b': 1_720_574_976,
  'qwen3-8b': 8_190_735_360,
  'qwen3-30b-a3b': 30_532_122_624,
  'mixtral-8x7b': 46_702_792_704,
  'gemma2-2b': 2_614_341_888,
  'gemma2-9b': 9_241_705_984,
  'gemma2-27b': 27_227_128_320,
  'gemma3-270m': 268_098_176,
  'gemma3-1b': 999_885_952,
  'gemma3-4b': 3_880_099_328 + 64 * 2560,
}
_SIZES = {
  size: (name, config)
  for name in families.names()
  for size, config in families.get(name).sizes.items()
}


def test_the_families_are_those_published():
  assert families.names() == [
    'gemma2',
    'gemma3',
    'llama',
    'mistral',
    'mixtral',
    'qwen2',
    'qwen3',
    'qwen3_moe',
  ]
  for name in families.names():
    family = families.get(name)
    assert family.name == name
    for model_type in family.model_types:
      assert families.find({'model_type': model_type}) is family


def test_an_unknown_family_is_named_with_those_known():
  with pytest.raises(ValueError, match="'mamba'.*known: gemma2, gemma3,"):
    families.find({'model_type': 'mamba'})
  with pytest.raises(ValueError, match="model_type='None'"):
    families.find({})
  with pytest.raises(ValueError, match="no 'mamba'; known: gemma2"):
    families.get('mamba')


def test_number_of_parameters_is_the_published_one():
  assert {k: c.num_params for k, (_, c) in _SIZES.items()} == _PUBLISHED


@pytest.mark.parametrize('size', _SIZES)
def test_published_config_survives_config_json(size):
  name, config = _SIZES[size]
  family = families.get(name)
  assert config.family == name
  written = family.config_to_hf(config)
  assert families.find(written) is family
  assert family.config_from_hf(written) == config


@pytest.mark.parametrize('name', families.names())
def test_weight_map_covers_the_parameters_exactly(name):
  family = families.get(name)
  config = next(iter(family.sizes.values()))
  config = dataclasses.replace(config, num_layers=2)
  model = Transformer(config)
  tokens = jnp.zeros((1, 1), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(tree))[0]
  shapes = {path_name(path): leaf.shape for path, leaf in leaves}
  sizes = base.dim_sizes(config)
  weights = family.weights(config)
  for ways in weights.values():
    assert len({layout.param_shape(w, sizes) for w in ways}) == 1
  assert shapes == {
    path: layout.param_shape(ways[0], sizes) for path, ways in weights.items()
  }


@pytest.mark.parametrize('name', families.names())
def test_what_a_family_cannot_express_is_an_error(name):
  family = families.get(name)
  config = next(iter(family.sizes.values()))
  changes = dict(qkv_bias=not config.qkv_bias, norm_plus_one=True)
  if config.norm_plus_one:
    changes['norm_plus_one'] = False
  if config.moe:
    changes['moe'] = None
  else:
    changes['moe'] = MoE(4, 2, 8)
  for field, value in changes.items():
    bad = dataclasses.replace(config, **{field: value})
    with pytest.raises(ValueError, match=f'(?s){name}.*{field}'):
      family.config_to_hf(bad)


def test_equal_models_have_one_canonical_config():
  config = families.get('gemma3').sizes['gemma3-270m']
  twice = dataclasses.replace(config, layer_pattern=config.layer_pattern * 2)
  assert base.canonical(twice) == config
  spelled = dataclasses.replace(config, query_scale=256**-0.5)
  assert base.canonical(spelled) == config
  plain = ModelConfig(8, 8, 2, 2, 2, 4, 8, 16, sliding_window=4)
  assert base.canonical(plain).sliding_window is None
  sliding = dataclasses.replace(
    plain, layer_pattern=('sliding',), sliding_rope=Rope(5.0)
  )
  assert base.canonical(sliding).rope == Rope(5.0)
