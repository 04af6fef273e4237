"""Gemma 2: norms after each part too, soft caps, every other layer a window.

Gemma Team, https://arxiv.org/abs/2408.00118.
"""

import dataclasses

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import _gemma
from jaxtrain.models.families import _weights
from jaxtrain.models.families import base


def _read(r):
  num_layers = r.integer('num_hidden_layers')
  default = [('sliding', 'full')[i % 2] for i in range(num_layers)]
  return r.decoder(
    layer_pattern=r.layer_pattern(default),
    **_gemma.read(r, attention_soft_cap=50.0, logit_soft_cap=30.0),
  )


GEMMA_2_2B = ModelConfig(
  family='gemma2',
  vocab_size=256_000,
  embed_dim=2304,
  num_layers=26,
  num_heads=8,
  num_kv_heads=4,
  head_dim=256,
  mlp_dim=9216,
  max_seq_len=8192,
  sliding_window=4096,
  layer_pattern=('sliding', 'full'),
  activation='gelu',
  post_norms=True,
  norm_plus_one=True,
  embed_scale=True,
  tie_embeddings=True,
  attention_soft_cap=50.0,
  logit_soft_cap=30.0,
)
GEMMA_2_9B = dataclasses.replace(
  GEMMA_2_2B,
  embed_dim=3584,
  num_layers=42,
  num_heads=16,
  num_kv_heads=8,
  mlp_dim=14_336,
)
GEMMA_2_27B = dataclasses.replace(
  GEMMA_2_2B,
  embed_dim=4608,
  num_layers=46,
  num_heads=32,
  num_kv_heads=16,
  head_dim=128,
  mlp_dim=36_864,
  query_scale=144**-0.5,
)

gemma2 = base.Family(
  name='gemma2',
  model_types=('gemma2',),
  architecture='Gemma2ForCausalLM',
  read=_read,
  write=_gemma.write,
  weights=_weights.decoder,
  sizes={
    'gemma2-2b': GEMMA_2_2B,
    'gemma2-9b': GEMMA_2_9B,
    'gemma2-27b': GEMMA_2_27B,
  },
)
