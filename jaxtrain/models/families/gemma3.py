"""Gemma 3, text: norms on queries and keys, five windows to one full layer.

Gemma Team, https://arxiv.org/abs/2503.19786. Of a model with a vision tower
the decoder alone is read.
"""

import dataclasses

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _gemma
from jaxtrain.models.families import _rope_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import base

# What the published models with a vision tower leave out of `text_config`.
_DEFAULTS = dict(
  vocab_size=262_208,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  max_position_embeddings=131_072,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
)
_VISION_KEYS = (
  'vision_config boi_token_index eoi_token_index image_token_index '
  'mm_tokens_per_image tie_word_embeddings'
).split()
_PATTERN = 6


def _read(r):
  if r.raw.get('model_type') == 'gemma3':
    for key in _VISION_KEYS:
      r.get(key, None)
    r.only(quantization_config=None)
    text = r.mapping('text_config') | {'model_type': 'gemma3_text'}
    return gemma3.config_from_hf(_DEFAULTS | text)
  num_layers = r.integer('num_hidden_layers')
  period = r.integer('sliding_window_pattern', _PATTERN)
  default = [
    'full' if (i + 1) % period == 0 else 'sliding' for i in range(num_layers)
  ]
  return r.decoder(
    layer_pattern=r.layer_pattern(default),
    rope=r.rope(1_000_000.0),
    sliding_rope=r.rope(
      10_000.0, 'sliding_attention', 'rope_local_base_freq', is_scaled=False
    ),
    qk_norm=True,
    **_gemma.read(r),
  )


def _write(config):
  local = config.sliding_rope or config.rope
  return dict(
    **_gemma.write(config),
    sliding_window_pattern=_PATTERN,
    rope_local_base_freq=local.theta,
    rope_parameters={
      'full_attention': _rope_json.parameters_of(config.rope),
      'sliding_attention': _rope_json.parameters_of(local),
    },
  )


def _tensor_name(name):
  """Drops the vision tower and the prefixes it brings along."""
  for prefix in ('model.', ''):
    if name.startswith(
      (prefix + 'vision_tower.', prefix + 'multi_modal_projector.')
    ):
      return None
  for prefix, ours in (
    ('language_model.model.', 'model.'),
    ('model.language_model.', 'model.'),
    ('language_model.lm_head.', 'lm_head.'),
  ):
    if name.startswith(prefix):
      return ours + name.removeprefix(prefix)
  return name


GEMMA_3_270M = ModelConfig(
  family='gemma3',
  vocab_size=262_144,
  embed_dim=640,
  num_layers=18,
  num_heads=4,
  num_kv_heads=1,
  head_dim=256,
  mlp_dim=2048,
  max_seq_len=32_768,
  rope=Rope(theta=1_000_000.0),
  sliding_rope=Rope(theta=10_000.0),
  sliding_window=512,
  layer_pattern=('sliding',) * 5 + ('full',),
  activation='gelu',
  qk_norm=True,
  post_norms=True,
  norm_plus_one=True,
  embed_scale=True,
  tie_embeddings=True,
)
GEMMA_3_1B = dataclasses.replace(
  GEMMA_3_270M, embed_dim=1152, num_layers=26, mlp_dim=6912
)
# The decoder of the model; its vision tower is not read.
GEMMA_3_4B = dataclasses.replace(
  GEMMA_3_1B,
  vocab_size=262_208,
  embed_dim=2560,
  num_layers=34,
  num_heads=8,
  num_kv_heads=4,
  mlp_dim=10_240,
  max_seq_len=131_072,
  sliding_window=1024,
  rope=Rope(theta=1_000_000.0, scaling='linear', factor=8.0),
)

gemma3 = base.Family(
  name='gemma3',
  model_types=('gemma3_text', 'gemma3'),
  architecture='Gemma3ForCausalLM',
  read=_read,
  write=_write,
  weights=_weights.decoder,
  tensor_name=_tensor_name,
  sizes={
    'gemma3-270m': GEMMA_3_270M,
    'gemma3-1b': GEMMA_3_1B,
    'gemma3-4b': GEMMA_3_4B,
  },
)
