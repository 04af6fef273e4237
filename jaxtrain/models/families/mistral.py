"""Mistral 7B: Llama's layers with a sliding window over all of them.

Jiang et al., https://arxiv.org/abs/2310.06825; from version 0.2 on without
the window.
"""

import dataclasses

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import _windows
from jaxtrain.models.families import base


def _read(r):
  return r.decoder(**_windows.uniform_window(r, r.window(absent=4096)))


def _write(config):
  return dict(
    hidden_act=_config_json.activation_name(config),
    sliding_window=config.sliding_window
    if _windows.is_sliding(config)
    else None,
  )


MISTRAL_7B_V01 = ModelConfig(
  family='mistral',
  vocab_size=32_000,
  embed_dim=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  mlp_dim=14_336,
  max_seq_len=32_768,
  sliding_window=4096,
  layer_pattern=('sliding',),
  norm_eps=1e-5,
)
MISTRAL_7B_V03 = dataclasses.replace(
  MISTRAL_7B_V01,
  vocab_size=32_768,
  rope=Rope(theta=1_000_000.0),
  sliding_window=None,
  layer_pattern=('full',),
)

mistral = base.Family(
  name='mistral',
  model_types=('mistral',),
  architecture='MistralForCausalLM',
  read=_read,
  write=_write,
  weights=_weights.decoder,
  sizes={
    'mistral-7b-v0.1': MISTRAL_7B_V01,
    'mistral-7b-v0.3': MISTRAL_7B_V03,
  },
)
