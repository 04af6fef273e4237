"""ModelConfig survives JSON exactly, and wrong JSON is refused by name."""

import dataclasses
import json

import pytest

from jaxtrain.models import config_json
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.config import Rope

_SMALL = ModelConfig(
  vocab_size=264,
  embed_dim=8,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=2,
  mlp_dim=16,
  max_seq_len=32,
)
_FULL = dataclasses.replace(
  _SMALL,
  family='gemma3',
  rope=Rope(theta=1e6 / 3, scaling='yarn', factor=4.0, attention_factor=0.1),
  sliding_rope=Rope(theta=0.1 + 0.2),
  sliding_window=7,
  layer_pattern=('sliding', 'sliding', 'full'),
  activation='gelu',
  tie_embeddings=True,
  query_scale=1 / 3,
  norm_eps=1e-5,
  logit_soft_cap=30.0,
  moe=MoE(4, 2, 24, normalize_weights=False),
)


@pytest.mark.parametrize('config', [_SMALL, _FULL], ids=['small', 'full'])
def test_round_trip_is_exact(config):
  text = json.dumps(config_json.to_json(config))
  back = config_json.from_json(json.loads(text))
  assert back == config
  assert hash(back) == hash(config)  # Lists in place of tuples would not hash.
  assert repr(back) == repr(config)  # Tells 1 from 1.0, which == does not.


def test_every_field_is_written():
  written = config_json.to_json(_FULL)
  assert set(written) == {f.name for f in dataclasses.fields(ModelConfig)}
  assert set(written['rope']) == {f.name for f in dataclasses.fields(Rope)}


def test_whole_floats_may_come_as_integers():
  value = config_json.to_json(_SMALL)
  value['rope']['theta'] = 10000
  assert repr(config_json.from_json(value)) == repr(_SMALL)


def test_later_fields_take_their_default():
  value = config_json.to_json(_FULL)
  del value['norm_plus_one'], value['rope']['beta_slow']
  assert config_json.from_json(value) == _FULL


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(colour='red'), 'no field colour'),
    (dict(rope=dict(pitch=1.0)), 'ModelConfig.rope has no field pitch'),
    (dict(vocab_size='264'), 'vocab_size=.264. must be int'),
    (dict(vocab_size=264.0), 'vocab_size=264.0 must be int'),
    (dict(qkv_bias=1), 'qkv_bias=1 must be bool'),
    (dict(moe=3), 'ModelConfig.moe must be a JSON object'),
    (dict(layer_pattern='full'), "layer_pattern must be a list, not 'full'"),
    (dict(num_heads=3), 'not a multiple'),
  ],
)
def test_wrong_json_names_the_field(change, message):
  value = config_json.to_json(_SMALL) | change
  with pytest.raises(ValueError, match=message):
    config_json.from_json(value)


def test_missing_field_is_named():
  value = config_json.to_json(_SMALL)
  del value['head_dim']
  with pytest.raises(ValueError, match='lacks head_dim'):
    config_json.from_json(value)
  with pytest.raises(ValueError, match='must be a JSON object'):
    config_json.from_json([])
