"""Spellings of config.json: transformers 4 and 5, switches, mistakes."""

import warnings

import pytest

from jaxtrain.models import families
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _rope_json

_SIZES = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
)


def _config(model_type, **changes):
  act = 'hidden_activation' if 'gemma' in model_type else 'hidden_act'
  value = 'gelu_pytorch_tanh' if 'gemma' in model_type else 'silu'
  config_json = _SIZES | {'model_type': model_type, act: value} | changes
  return families.find(config_json).config_from_hf(config_json)


_LLAMA_3 = dict(
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=128,
)
_ROPES = {
  'default': (dict(rope_type='default'), Rope(5e5)),
  'linear': (
    dict(rope_type='linear', factor=2),
    Rope(5e5, 'linear', 2.0),
  ),
  'llama3': (
    dict(rope_type='llama3', **_LLAMA_3),
    Rope(5e5, 'llama3', 8.0, original_max_len=128),
  ),
  'yarn': (
    dict(
      rope_type='yarn', factor=4.0, original_max_position_embeddings=128,
      beta_fast=16.0, attention_factor=1.5,
    ),
    Rope(
      5e5, 'yarn', 4.0, original_max_len=128, beta_fast=16.0,
      attention_factor=1.5,
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('kind', _ROPES)
def test_rope_in_all_spellings(kind):
  scaling, want = _ROPES[kind]
  legacy = {'type' if k == 'rope_type' else k: v for k, v in scaling.items()}
  for spelled in (
    dict(rope_theta=5e5, rope_scaling=scaling),
    dict(rope_theta=5e5, rope_scaling=legacy),
    dict(rope_parameters=dict(rope_theta=5e5, **scaling)),
    dict(rope_theta=5e5, rope_parameters=scaling),
    dict(
      rope_parameters=dict(
        full_attention=dict(rope_theta=5e5, **scaling),
        sliding_attention=dict(rope_theta=5e5, **scaling),
      )
    ),
  ):
    config = _config('llama', **spelled)
    assert (config.rope, config.sliding_rope) == (want, None), spelled
  assert _rope_json.read(_rope_json.parameters_of(want), 1.0, 512) == want


def test_rope_defaults_are_those_of_transformers():
  assert _config('llama').rope == Rope(10_000.0)
  moe = dict(num_local_experts=2, num_experts_per_tok=1)
  assert _config('mixtral', **moe).rope == Rope(1_000_000.0)
  gemma = _config('gemma3_text')
  assert gemma.rope == Rope(1_000_000.0)
  assert gemma.sliding_rope == Rope(10_000.0)
  yarn = _config('qwen2', rope_scaling=dict(type='yarn', factor=2.0))
  assert yarn.rope.original_max_len == 512  # max_position_embeddings
  implied = dict(
    rope_type='yarn', factor=None, original_max_position_embeddings=128
  )
  assert _config('qwen2', rope_scaling=implied).rope.factor == 4.0


def test_yarn_mscale_is_an_attention_factor():
  # DeepSeek: (0.1 m ln s + 1) / (0.1 m' ln s + 1).
  scaling = dict(
    type='yarn',
    factor=40.0,
    original_max_position_embeddings=64,
    mscale=1.0,
    mscale_all_dim=0.5,
  )
  factor = _config('qwen2', rope_scaling=scaling).rope.attention_factor
  assert factor == pytest.approx(1.3688879 / 1.1844440, abs=1e-6)


@pytest.mark.parametrize(
  'scaling, words',
  [
    (dict(rope_type='dynamic', factor=2.0), "'dynamic'.*allowed: default"),
    (dict(rope_type='longrope', factor=2.0), "'longrope'"),
    (dict(rope_type='linear'), "'factor' is missing"),
    (dict(rope_type='linear', factor='two'), "factor='two' must be a number"),
    (dict(rope_type='linear', factor=2.0, colour=1), 'colour not supported'),
    (dict(type='default', mrope_section=[1]), 'mrope_section not supported'),
    (dict(rope_type='llama3', factor=8.0), "'low_freq_factor' is missing"),
    (
      dict(rope_type='yarn', factor=2.0, truncate=False),
      'truncate=false is not supported',
    ),
    (
      dict(rope_type='default', partial_rotary_factor=0.5),
      'partial_rotary_factor',
    ),
  ],
)
def test_unsupported_rope(scaling, words):
  with pytest.raises(ValueError, match=f'(?s)config.json.*{words}'):
    _config('llama', rope_scaling=scaling)


def test_windows_of_qwen_start_late():
  window = dict(sliding_window=8, max_window_layers=3)
  assert _config('qwen2', **window).layer_types == ('full',) * 4
  used = _config('qwen2', use_sliding_window=True, **window)
  assert used.layer_types == ('full', 'full', 'full', 'sliding')
  assert used.sliding_window == 8
  listed = ['sliding_attention', 'full_attention'] * 2
  given = _config(
    'qwen3', use_sliding_window=True, layer_types=listed, **window
  )
  assert given.layer_pattern == ('sliding', 'full')
  every = _config(
    'qwen3_moe',
    use_sliding_window=True,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    **window,
  )
  assert every.layer_pattern == ('sliding',)


def test_windows_of_mistral_and_gemma():
  assert _config('mistral').sliding_window == 4096  # When absent, as theirs.
  none = _config('mistral', sliding_window=None)
  assert none.layer_pattern == ('full',)
  assert _config('gemma2').layer_pattern == ('sliding', 'full')
  six = _config('gemma3_text', num_hidden_layers=7)
  assert six.layer_types == ('sliding',) * 5 + ('full', 'sliding')
  two = _config('gemma3_text', sliding_window_pattern=2)
  assert two.layer_pattern == ('sliding', 'full')


def test_gemma_soft_caps_and_scale():
  absent = _config('gemma2')
  assert (absent.attention_soft_cap, absent.logit_soft_cap) == (50.0, 30.0)
  null = _config(
    'gemma2', attn_logit_softcapping=None, final_logit_softcapping=None
  )
  assert (null.attention_soft_cap, null.logit_soft_cap) == (None, None)
  assert _config('gemma3_text').attention_soft_cap is None
  scaled = _config('gemma2', query_pre_attn_scalar=144, head_dim=128)
  assert scaled.query_scale == 144**-0.5
  assert absent.tie_embeddings


def test_gemma_3_with_a_vision_tower():
  text = dict(_SIZES, model_type='gemma3_text', sliding_window=1024)
  text |= dict(rope_scaling=dict(rope_type='linear', factor=8.0))
  text |= dict(hidden_activation='gelu_pytorch_tanh')
  del text['vocab_size'], text['num_attention_heads']
  family = families.get('gemma3')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    config = family.config_from_hf(
      dict(model_type='gemma3', text_config=text, vision_config={})
    )
  assert (config.vocab_size, config.num_heads) == (262_208, 8)
  assert config.rope == Rope(1e6, 'linear', 8.0)
  assert config.sliding_rope == Rope(1e4)
  name = family.tensor_name
  assert name('language_model.model.norm.weight') == 'model.norm.weight'
  assert name('model.language_model.norm.weight') == 'model.norm.weight'
  assert name('vision_tower.x') is None
  assert name('model.multi_modal_projector.x') is None
  assert name('model.norm.weight') == 'model.norm.weight'


@pytest.mark.parametrize(
  'model_type, change, words',
  [
    ('llama', dict(mlp_bias=True), 'mlp_bias=True is not supported'),
    ('llama', dict(attention_bias=True), 'attention_bias=True'),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True'),
    ('gemma2', dict(attention_bias=True), 'attention_bias=True'),
    ('gemma3_text', dict(use_bidirectional_attention=True), 'bidirectional'),
    ('llama', dict(hidden_act='relu'), "hidden_act='relu'.*allowed: silu"),
    ('llama', dict(hidden_act=None), "'hidden_act' is missing"),
    ('llama', dict(quantization_config={'bits': 4}), 'quantization_config'),
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    ('llama', dict(hidden_size=None), "'hidden_size' is missing"),
    ('llama', dict(hidden_size='32'), "hidden_size='32' must be an integer"),
    ('llama', dict(rms_norm_eps=True), 'rms_norm_eps=True must be a number'),
    ('llama', dict(num_key_value_heads=3), 'not a multiple'),
    ('qwen2', dict(layer_types=['full_attention']), '1 entries.*wanted: 4'),
    (
      'qwen2',
      dict(layer_types=['chunked_attention'] * 4),
      'chunked_attention',
    ),
    ('qwen3_moe', dict(mlp_only_layers=[0]), 'mlp_only_layers'),
    ('qwen3_moe', dict(decoder_sparse_step=2), 'decoder_sparse_step=2'),
    ('qwen3_moe', {}, "'num_local_experts' is missing"),
    ('llama', dict(rope_theta=0), 'rope_theta=0 must be a number above zero'),
    ('llama', dict(rms_norm_eps=-1e-6), 'rms_norm_eps=-1e-06 must be'),
    ('llama', dict(num_hidden_layers=0), 'num_hidden_layers=0.*at least 1'),
    ('llama', dict(rope_scaling='linear'), "rope_scaling='linear' is not a"),
    ('llama', dict(tie_word_embeddings='no'), "tie_word_embeddings='no' is"),
    ('llama', dict(hidden_act=['silu']), 'hidden_act='),
    ('mistral', dict(sliding_window=-1), 'sliding_window=-1'),
    ('qwen2', dict(layer_types=3), 'layer_types=3 is not a list'),
    ('gemma2', dict(query_pre_attn_scalar=0), 'query_pre_attn_scalar=0'),
    ('gemma3_text', dict(sliding_window_pattern=0), 'sliding_window_pattern'),
  ],
)
def test_unsupported_switch(model_type, change, words):
  with pytest.raises(ValueError, match=f'(?s)config.json.*{words}'):
    _config(model_type, **change)


def test_unknown_keys_are_warned_of_by_name():
  with pytest.warns(UserWarning, match="'llama'.*ignored: clip_qkv$"):
    _config('llama', clip_qkv=8.0, torch_dtype='bfloat16', _private=1)
