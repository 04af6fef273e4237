"""The keys of a Hugging Face config.json that families share, both ways.

Reads the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`, per layer type or not) and writes both. A switch that
`ModelConfig` lacks is an error, a key that nobody knows a warning.
"""

from collections.abc import Mapping, Sequence
from typing import Any
import warnings

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.config import MoE
from jaxtrain.models.config import Rope
from jaxtrain.models.families import _rope_json

# Keys that do not change what the model computes from tokens.
_HARMLESS = frozenset(
  'model_type architectures transformers_version torch_dtype dtype '
  'bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id '
  'decoder_start_token_id initializer_range use_cache attention_dropout '
  'cache_implementation pretraining_tp output_router_logits '
  'router_aux_loss_coef router_jitter_noise output_attentions '
  'output_hidden_states return_dict chunk_size_feed_forward id2label label2id '
  'problem_type is_encoder_decoder is_decoder add_cross_attention '
  'cross_attention_hidden_size torchscript use_bfloat16 tie_encoder_decoder '
  'attn_implementation name_or_path tokenizer_class prefix '
  'task_specific_params finetuning_task pruned_heads '
  'experts_implementation'.split()
)
_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_new': 'gelu',
}
LAYER_TYPES = {'full_attention': 'full', 'sliding_attention': 'sliding'}
_REQUIRED = object()


class Reader:
  """Reads config.json key by key and remembers which were read."""

  def __init__(self, raw: Mapping[str, Any], family: str):
    if not isinstance(raw, Mapping):
      raise ValueError(f'config.json: {type(raw).__name__} is not an object')
    self.raw = raw
    self.family = family
    self._read = set()

  def get(self, key: str, default: Any = _REQUIRED) -> Any:
    """The value of a key; `default` if absent or null."""
    self._read.add(key)
    value = self.raw.get(key)
    if value is not None:
      return value
    if default is _REQUIRED:
      raise ValueError(
        f'config.json of family {self.family!r}: {key!r} is missing'
      )
    return default

  def integer(
    self, key: str, default: Any = _REQUIRED, minimum: int = 1
  ) -> Any:
    """An integer, at least `minimum`; `default` if absent or null."""
    value = self.get(key, default)
    if value is not default and (type(value) is not int or value < minimum):
      raise ValueError(
        f'config.json: {key}={value!r} must be an integer, at least {minimum}'
      )
    return value

  def number(self, key: str, default: Any = _REQUIRED) -> Any:
    """A positive float; `default` if absent or null."""
    value = self.get(key, default)
    if value is default:
      return value
    return _rope_json.positive(value, f'config.json: {key}')

  def boolean(self, key: str, default: bool) -> bool:
    """A boolean; `default` if absent or null."""
    return self._typed(key, default, bool)

  def mapping(self, key: str) -> dict[str, Any]:
    """An object, which must be there."""
    return dict(self._typed(key, _REQUIRED, Mapping))

  def _typed(self, key, default, kind):
    value = self.get(key, default)
    if value is not default and not isinstance(value, kind):
      raise ValueError(f'config.json: {key}={value!r} is not a {kind.__name__}')
    return value

  def only(self, **allowed: Any) -> None:
    """Demands that keys are absent, null or have the one value given."""
    for key, want in allowed.items():
      if (value := self.get(key, want)) != want:
        raise ValueError(
          f'config.json of family {self.family!r}: {key}={value!r} is not '
          f'supported; allowed: {want!r}'
        )

  def warn_of_unread(self) -> None:
    """Warns of keys that were not read and are not known to be harmless."""
    unread = sorted(
      k for k in set(self.raw) - self._read - _HARMLESS if not k.startswith('_')
    )
    if unread:
      warnings.warn(
        f'config.json of family {self.family!r}: keys without a meaning here '
        f'are ignored: {", ".join(unread)}',
        stacklevel=4,
      )

  def window(self, absent: int | None = None) -> int | None:
    """`sliding_window`, where null means none; `absent` if it is not there."""
    if 'sliding_window' not in self.raw:
      return absent
    return self.integer('sliding_window', None)

  def activation(self, *keys: str) -> str:
    """The gate's activation under the first of `keys` that is there."""
    for key in keys:
      if (value := self.get(key, None)) is not None:
        if str(value) not in _ACTIVATIONS:
          raise ValueError(
            f'config.json: {key}={value!r} is not supported; allowed: '
            f'{", ".join(_ACTIVATIONS)}'
          )
        return _ACTIVATIONS[value]
    raise ValueError(f'config.json: {keys[0]!r} is missing')

  def layer_pattern(self, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, or else `default` (one 'full' or 'sliding' per layer)."""
    given = self._typed('layer_types', None, list)
    if given is None:
      return shortest_pattern(default)
    given = [str(t) for t in given]
    bad = sorted(set(given) - set(LAYER_TYPES))
    num_layers = self.integer('num_hidden_layers')
    if bad or len(given) != num_layers:
      raise ValueError(
        f'config.json: layer_types has {len(given)} entries, of which unknown: '
        f'{bad}; wanted: {num_layers} of {", ".join(LAYER_TYPES)}'
      )
    return shortest_pattern([LAYER_TYPES[t] for t in given])

  def rope(
    self,
    theta: float,
    layer_type: str = 'full_attention',
    theta_key: str = 'rope_theta',
    is_scaled: bool = True,
  ) -> Rope:
    """The rotary embedding of one layer type.

    Args:
      theta: Base if none is given.
      layer_type: Which entry of a `rope_parameters` that has one per type.
      theta_key: transformers 4's key of the base.
      is_scaled: Whether transformers 4's `rope_scaling` applies to this type.
    """
    theta = self.number(theta_key, theta)
    scaling = self._typed('rope_scaling', {}, Mapping) if is_scaled else {}
    parameters = self._typed('rope_parameters', {}, Mapping)
    nested = [k for k in parameters if k in LAYER_TYPES]
    if nested:
      parameters = parameters.get(layer_type) or {}
      if not isinstance(parameters, Mapping):
        raise ValueError(f'config.json: rope_parameters={parameters!r}')
    elif not is_scaled:
      parameters = {}
    # As in transformers 5: the older key, where both are given, wins.
    parameters = {**parameters, **scaling}
    self.only(partial_rotary_factor=1.0)
    original = self.integer('original_max_position_embeddings', None)
    max_len = self.integer('max_position_embeddings')
    return _rope_json.read(parameters, theta, max_len, original)

  def decoder(self, theta: float = 10_000.0, **overrides: Any) -> ModelConfig:
    """A `ModelConfig` from the keys all families have, then `overrides`.

    Args:
      theta: Base of the rotary embedding if none is given.
      **overrides: Fields that the family reads differently.
    """
    if (quantization := self.get('quantization_config', None)) is not None:
      raise ValueError(
        f'config.json: quantization_config={quantization!r} is not supported; '
        'allowed: float32, float16 and bfloat16 weights'
      )
    embed_dim = self.integer('hidden_size')
    num_heads = self.integer('num_attention_heads')
    values = dict(
      family=self.family,
      vocab_size=self.integer('vocab_size'),
      embed_dim=embed_dim,
      num_layers=self.integer('num_hidden_layers'),
      num_heads=num_heads,
      num_kv_heads=self.integer('num_key_value_heads', num_heads),
      head_dim=self.integer('head_dim', embed_dim // max(num_heads, 1)),
      mlp_dim=self.integer('intermediate_size'),
      max_seq_len=self.integer('max_position_embeddings'),
      norm_eps=self.number('rms_norm_eps', 1e-6),
      tie_embeddings=self.boolean('tie_word_embeddings', False),
    )
    values.update(overrides)
    if 'rope' not in values:
      sliding = self.rope(theta, 'sliding_attention')
      values['rope'] = self.rope(theta)
      values['sliding_rope'] = sliding if sliding != values['rope'] else None
    if 'activation' not in values:
      values['activation'] = self.activation('hidden_act')
    return ModelConfig(**values)


def shared_keys(config: ModelConfig) -> dict[str, Any]:
  """The keys of config.json that every family writes."""
  return dict(
    vocab_size=config.vocab_size,
    hidden_size=config.embed_dim,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.mlp_dim,
    max_position_embeddings=config.max_seq_len,
    rms_norm_eps=config.norm_eps,
    tie_word_embeddings=config.tie_embeddings,
    **_rope_json.keys(config.rope),
  )


def activation_name(config: ModelConfig) -> str:
  """`hidden_act` of config.json."""
  return {'silu': 'silu', 'gelu': 'gelu_pytorch_tanh'}[config.activation]


def shortest_pattern(types: Sequence[str]) -> tuple[str, ...]:
  """The shortest prefix of `types` that, repeated, gives `types`."""
  for size in range(1, len(types) + 1):
    if all(t == types[i % size] for i, t in enumerate(types)):
      return tuple(types[:size])
  return ()


def experts_of(config: ModelConfig) -> MoE:
  """The mixture of experts of a family that always has one."""
  if config.moe is None:
    raise ValueError(
      f'family {config.family!r} has experts, but the config has moe=None'
    )
  return config.moe
