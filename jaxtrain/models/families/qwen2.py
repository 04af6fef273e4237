"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v.

Yang et al., https://arxiv.org/abs/2407.10671 and
https://arxiv.org/abs/2412.15115.
"""

import dataclasses

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import _windows
from jaxtrain.models.families import base


def _read(r):
  return r.decoder(qkv_bias=True, **_windows.read_late_windows(r))


def _write(config):
  return dict(
    hidden_act=_config_json.activation_name(config),
    **_windows.write_late_windows(config),
  )


QWEN_2_5_0_5B = ModelConfig(
  family='qwen2',
  vocab_size=151_936,
  embed_dim=896,
  num_layers=24,
  num_heads=14,
  num_kv_heads=2,
  head_dim=64,
  mlp_dim=4864,
  max_seq_len=32_768,
  rope=Rope(theta=1_000_000.0),
  qkv_bias=True,
  tie_embeddings=True,
)
QWEN_2_5_7B_INSTRUCT = dataclasses.replace(
  QWEN_2_5_0_5B,
  vocab_size=152_064,
  embed_dim=3584,
  num_layers=28,
  num_heads=28,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=18_944,
  tie_embeddings=False,
)

qwen2 = base.Family(
  name='qwen2',
  model_types=('qwen2',),
  architecture='Qwen2ForCausalLM',
  read=_read,
  write=_write,
  weights=_weights.decoder,
  sizes={
    'qwen2.5-0.5b': QWEN_2_5_0_5B,
    'qwen2.5-7b-instruct': QWEN_2_5_7B_INSTRUCT,
  },
)
