"""Mixtral: Mistral with 8 experts of which a token uses 2.

Jiang et al., https://arxiv.org/abs/2401.04088.
"""

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import _windows
from jaxtrain.models.families import base


def _read(r):
  return r.decoder(
    theta=1_000_000.0,
    **_windows.uniform_window(r, r.window()),
    moe=MoE(
      num_experts=r.integer('num_local_experts', 8),
      num_experts_per_token=r.integer('num_experts_per_tok', 2),
      mlp_dim=r.integer('intermediate_size'),
    ),
  )


def _write(config):
  moe = _config_json.experts_of(config)
  return dict(
    hidden_act=_config_json.activation_name(config),
    sliding_window=config.sliding_window
    if _windows.is_sliding(config)
    else None,
    num_local_experts=moe.num_experts,
    num_experts_per_tok=moe.num_experts_per_token,
    intermediate_size=moe.mlp_dim,
  )


def _weight_map(config):
  expert = 'block_sparse_moe.experts.{E}.'
  return _weights.decoder(config) | _weights.experts(
    router='block_sparse_moe.gate.weight',
    gate=expert + 'w1.weight',
    up=expert + 'w3.weight',
    down=expert + 'w2.weight',
  )


MIXTRAL_8X7B = ModelConfig(
  family='mixtral',
  vocab_size=32_000,
  embed_dim=4096,
  num_layers=32,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  mlp_dim=14_336,
  max_seq_len=32_768,
  rope=Rope(theta=1_000_000.0),
  norm_eps=1e-5,
  moe=MoE(num_experts=8, num_experts_per_token=2, mlp_dim=14_336),
)

mixtral = base.Family(
  name='mixtral',
  model_types=('mixtral',),
  architecture='MixtralForCausalLM',
  read=_read,
  write=_write,
  weights=_weight_map,
  sizes={'mixtral-8x7b': MIXTRAL_8X7B},
)
