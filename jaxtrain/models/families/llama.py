"""Llama 2 and 3: grouped queries, SwiGLU, RMS norms before each part.

Touvron et al., https://arxiv.org/abs/2307.09288, and Grattafiori et al.,
https://arxiv.org/abs/2407.21783. Many other models are stored as Llama too.
"""

import dataclasses

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import base


def _read(r):
  r.only(attention_bias=False, mlp_bias=False)
  return r.decoder()


def _write(config):
  return dict(
    hidden_act=_config_json.activation_name(config),
    attention_bias=False,
    mlp_bias=False,
  )


LLAMA_2_7B = ModelConfig(
  family='llama',
  vocab_size=32_000,
  embed_dim=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=32,
  head_dim=128,
  mlp_dim=11_008,
  max_seq_len=4096,
  norm_eps=1e-5,
)
LLAMA_3_8B = dataclasses.replace(
  LLAMA_2_7B,
  vocab_size=128_256,
  num_kv_heads=8,
  mlp_dim=14_336,
  max_seq_len=8192,
  rope=Rope(theta=500_000.0),
)
LLAMA_3_1_8B = dataclasses.replace(
  LLAMA_3_8B,
  max_seq_len=131_072,
  rope=Rope(theta=500_000.0, scaling='llama3', factor=8.0),
)
LLAMA_3_1_70B = dataclasses.replace(
  LLAMA_3_1_8B, embed_dim=8192, num_layers=80, num_heads=64, mlp_dim=28_672
)
LLAMA_3_2_1B = dataclasses.replace(
  LLAMA_3_1_8B,
  embed_dim=2048,
  num_layers=16,
  head_dim=64,
  mlp_dim=8192,
  rope=Rope(theta=500_000.0, scaling='llama3', factor=32.0),
  tie_embeddings=True,
)
LLAMA_3_2_3B = dataclasses.replace(
  LLAMA_3_2_1B, embed_dim=3072, num_layers=28, num_heads=24, head_dim=128
)

llama = base.Family(
  name='llama',
  model_types=('llama',),
  architecture='LlamaForCausalLM',
  read=_read,
  write=_write,
  weights=_weights.decoder,
  sizes={
    'llama2-7b': LLAMA_2_7B,
    'llama3-8b': LLAMA_3_8B,
    'llama3.1-8b': LLAMA_3_1_8B,
    'llama3.1-70b': LLAMA_3_1_70B,
    'llama3.2-1b': LLAMA_3_2_1B,
    'llama3.2-3b': LLAMA_3_2_3B,
  },
)
