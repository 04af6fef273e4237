"""What Gemma 2 and 3 share of config.json."""

from typing import Any

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import _config_json
from jaxtrain.models.families import _windows


def read(
  r: _config_json.Reader,
  *,
  attention_soft_cap: float | None = None,
  logit_soft_cap: float | None = None,
) -> dict[str, Any]:
  """Fields of `ModelConfig`; the soft caps are those of an absent key."""
  # `use_bidirectional_attention` makes an encoder.
  r.only(attention_bias=False, use_bidirectional_attention=False)
  head_dim = r.integer('head_dim', 256)

  def cap(key, absent):
    return r.number(key, None if key in r.raw else absent)

  scalar = r.number('query_pre_attn_scalar', 256.0)
  return dict(
    head_dim=head_dim,
    sliding_window=r.window(absent=4096),
    activation=r.activation('hidden_activation', 'hidden_act'),
    post_norms=True,
    norm_plus_one=True,
    embed_scale=True,
    tie_embeddings=r.boolean('tie_word_embeddings', True),
    query_scale=None if scalar == head_dim else scalar**-0.5,
    attention_soft_cap=cap('attn_logit_softcapping', attention_soft_cap),
    logit_soft_cap=cap('final_logit_softcapping', logit_soft_cap),
  )


def write(config: ModelConfig) -> dict[str, Any]:
  """Keys of `read`."""
  scale = config.query_scale
  scalar = config.head_dim if scale is None else scale**-2
  if abs(scalar - round(scalar)) < 1e-9 * scalar:
    scalar = round(scalar)
  return dict(
    hidden_activation=_config_json.activation_name(config),
    attention_bias=False,
    query_pre_attn_scalar=scalar,
    # transformers builds the mask of a window even if no layer uses it.
    sliding_window=config.sliding_window or 4096,
    layer_types=_windows.hf_layer_types(config),
    attn_logit_softcapping=config.attention_soft_cap,
    final_logit_softcapping=config.logit_soft_cap,
  )
