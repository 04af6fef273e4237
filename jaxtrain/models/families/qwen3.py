"""Qwen3: norms on queries and keys in place of Qwen2's biases.

Yang et al., https://arxiv.org/abs/2505.09388.
"""

import dataclasses

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import _windows
from jaxtrain.models.families import base


def _read(r):
  r.only(attention_bias=False)
  return r.decoder(
    qk_norm=True,
    head_dim=r.integer('head_dim', 128),
    **_windows.read_late_windows(r),
  )


def _write(config):
  return dict(
    hidden_act=_config_json.activation_name(config),
    attention_bias=False,
    **_windows.write_late_windows(config),
  )


QWEN_3_0_6B = ModelConfig(
  family='qwen3',
  vocab_size=151_936,
  embed_dim=1024,
  num_layers=28,
  num_heads=16,
  num_kv_heads=8,
  head_dim=128,
  mlp_dim=3072,
  max_seq_len=40_960,
  rope=Rope(theta=1_000_000.0),
  qk_norm=True,
  tie_embeddings=True,
)
QWEN_3_1_7B = dataclasses.replace(QWEN_3_0_6B, embed_dim=2048, mlp_dim=6144)
QWEN_3_8B = dataclasses.replace(
  QWEN_3_0_6B,
  embed_dim=4096,
  num_layers=36,
  num_heads=32,
  mlp_dim=12_288,
  tie_embeddings=False,
)

qwen3 = base.Family(
  name='qwen3',
  model_types=('qwen3',),
  architecture='Qwen3ForCausalLM',
  read=_read,
  write=_write,
  weights=_weights.decoder,
  sizes={
    'qwen3-0.6b': QWEN_3_0_6B,
    'qwen3-1.7b': QWEN_3_1_7B,
    'qwen3-8b': QWEN_3_8B,
  },
)
