"""Weight maps that families share.

Letters: L layers, V vocab, D model, N query heads, K kv heads, H head dim,
F feed-forward, E experts.
"""

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families.base import Weight
from jaxtrain.models.families.base import WeightMap

_LAYER = 'model.layers.{L}.'


def decoder(config: ModelConfig) -> WeightMap:
  """Map of a decoder as the families name it, without the experts."""
  out = {
    'embed/embedding': Weight('model.embed_tokens.weight', 'V D', 'V D'),
    'final_norm/scale': Weight('model.norm.weight', 'D', 'D'),
  }
  if not config.tie_embeddings:
    out['unembed/kernel'] = Weight('lm_head.weight', 'D V', 'V D')

  def layer(path, name, ours, theirs):
    out[f'layers/{path}'] = Weight(_LAYER + name, ours, theirs)

  for ours, theirs, letter in (
    ('query', 'q', 'N'),
    ('key', 'k', 'K'),
    ('value', 'v', 'K'),
  ):
    name = f'self_attn.{theirs}_proj'
    layer(
      f'attention/{ours}/kernel',
      f'{name}.weight',
      f'L D {letter} H',
      f'{letter}H D',
    )
    if config.qkv_bias:
      layer(
        f'attention/{ours}/bias', f'{name}.bias', f'L {letter} H', f'{letter}H'
      )
  layer('attention/out/kernel', 'self_attn.o_proj.weight', 'L N H D', 'D NH')
  if config.qk_norm:
    layer('attention/query_norm/scale', 'self_attn.q_norm.weight', 'L H', 'H')
    layer('attention/key_norm/scale', 'self_attn.k_norm.weight', 'L H', 'H')
  layer('pre_attention_norm/scale', 'input_layernorm.weight', 'L D', 'D')
  norms = {'pre_mlp_norm': 'post_attention_layernorm'}
  if config.post_norms:
    norms = {
      'post_attention_norm': 'post_attention_layernorm',
      'pre_mlp_norm': 'pre_feedforward_layernorm',
      'post_mlp_norm': 'post_feedforward_layernorm',
    }
  for ours, theirs in norms.items():
    layer(f'{ours}/scale', f'{theirs}.weight', 'L D', 'D')
  if not config.moe:
    layer('mlp/gate/kernel', 'mlp.gate_proj.weight', 'L D F', 'F D')
    layer('mlp/up/kernel', 'mlp.up_proj.weight', 'L D F', 'F D')
    layer('mlp/down/kernel', 'mlp.down_proj.weight', 'L F D', 'D F')
  return {path: (weight,) for path, weight in out.items()}


def experts(router: str, gate: str, up: str, down: str) -> WeightMap:
  """Map of a mixture of experts, one tensor per expert or all in one.

  Args:
    router: Name within the layer of the router.
    gate: Name within the layer of an expert's gate, with '{E}'.
    up: The same for its up projection.
    down: The same for its down projection.
  """
  # transformers 5 keeps the experts of a layer in two tensors.
  fused = _LAYER + 'mlp.experts.'
  return {
    'layers/moe/router/kernel': tuple(
      Weight(_LAYER + name, 'L D E', 'E D')
      for name in dict.fromkeys((router, 'mlp.gate.weight'))
    ),
    'layers/moe/gate': (
      Weight(_LAYER + gate, 'L E D F', 'F D'),
      Weight(fused + 'gate_up_proj', 'L E D F', 'E 0F D'),
    ),
    'layers/moe/up': (
      Weight(_LAYER + up, 'L E D F', 'F D'),
      Weight(fused + 'gate_up_proj', 'L E D F', 'E 1F D'),
    ),
    'layers/moe/down': (
      Weight(_LAYER + down, 'L E F D', 'D F'),
      Weight(fused + 'down_proj', 'L E F D', 'E D F'),
    ),
  }
