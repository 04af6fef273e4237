"""Qwen3 MoE: Qwen3 with 128 experts of which a token uses 8.

Yang et al., https://arxiv.org/abs/2505.09388.
"""

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _weights
from jaxtrain.models.families import _windows
from jaxtrain.models.families import base


def _read(r):
  r.only(attention_bias=False, decoder_sparse_step=1, mlp_only_layers=[])
  r.get('max_window_layers', None)  # Unused: a window is on every layer.
  window = r.window(absent=4096)
  if not r.boolean('use_sliding_window', False):
    window = None
  num_experts = r.integer('num_experts', None)
  if num_experts is None:  # As some versions of transformers 5 write it.
    num_experts = r.integer('num_local_experts')
  return r.decoder(
    qk_norm=True,
    head_dim=r.integer('head_dim', 128),
    **_windows.uniform_window(r, window),
    moe=MoE(
      num_experts=num_experts,
      num_experts_per_token=r.integer('num_experts_per_tok'),
      mlp_dim=r.integer('moe_intermediate_size'),
      normalize_weights=r.boolean('norm_topk_prob', False),
    ),
  )


def _write(config):
  moe = _config_json.experts_of(config)
  return dict(
    hidden_act=_config_json.activation_name(config),
    attention_bias=False,
    use_sliding_window=_windows.is_sliding(config),
    sliding_window=_windows.window(config),
    num_experts=moe.num_experts,
    num_experts_per_tok=moe.num_experts_per_token,
    moe_intermediate_size=moe.mlp_dim,
    norm_topk_prob=moe.normalize_weights,
    decoder_sparse_step=1,
    mlp_only_layers=[],
  )


def _weight_map(config):
  expert = 'mlp.experts.{E}.'
  return _weights.decoder(config) | _weights.experts(
    router='mlp.gate.weight',
    gate=expert + 'gate_proj.weight',
    up=expert + 'up_proj.weight',
    down=expert + 'down_proj.weight',
  )


QWEN_3_30B_A3B = ModelConfig(
  family='qwen3_moe',
  vocab_size=151_936,
  embed_dim=2048,
  num_layers=48,
  num_heads=32,
  num_kv_heads=4,
  head_dim=128,
  mlp_dim=6144,
  max_seq_len=40_960,
  rope=Rope(theta=1_000_000.0),
  qk_norm=True,
  moe=MoE(num_experts=128, num_experts_per_token=8, mlp_dim=768),
)

qwen3_moe = base.Family(
  name='qwen3_moe',
  model_types=('qwen3_moe',),
  architecture='Qwen3MoeForCausalLM',
  read=_read,
  write=_write,
  weights=_weight_map,
  sizes={'qwen3-30b-a3b': QWEN_3_30B_A3B},
)
