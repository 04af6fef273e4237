"""Rotary embeddings as Hugging Face config.json spells them, both ways."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jaxtrain.models.config import Rope

# Fields of `Rope` that each kind of scaling uses, and their published keys.
_ROPE_KEYS = {
  'none': {},
  'linear': {'factor': 'factor'},
  'llama3': {
    'factor': 'factor',
    'original_max_len': 'original_max_position_embeddings',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
  },
  'yarn': {
    'factor': 'factor',
    'original_max_len': 'original_max_position_embeddings',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'attention_factor': 'attention_factor',
  },
}


def read(
  parameters: Mapping[str, Any],
  theta: float,
  max_len: int,
  original_len: int | None = None,
) -> Rope:
  """Reads `rope_scaling` or one `rope_parameters` of a config.json.

  Args:
    parameters: The JSON object.
    theta: Base if `parameters` has none.
    max_len: `max_position_embeddings`, the original context if none is given.
    original_len: `original_max_position_embeddings` outside of `parameters`.

  Raises:
    ValueError: An unknown kind, a missing or an unknown key.
  """
  rest = dict(parameters)
  legacy = rest.pop('type', 'default')
  kind = str(rest.pop('rope_type', legacy))
  scaling = 'none' if kind == 'default' else kind
  own_theta = rest.pop('rope_theta', None)
  theta = positive(theta if own_theta is None else own_theta, 'rope_theta')
  if rest.pop('partial_rotary_factor', 1.0) != 1.0:
    raise ValueError(
      f'rope {dict(parameters)}: partial_rotary_factor is not supported; '
      'allowed: 1.0'
    )
  if scaling not in _ROPE_KEYS:
    raise ValueError(
      f'rope type {kind!r} is not supported; allowed: default, linear, llama3, '
      'yarn'
    )
  if scaling in ('llama3', 'yarn'):
    given = original_len or rest.get('original_max_position_embeddings')
    rest['original_max_position_embeddings'] = given or max_len
    if scaling == 'yarn':
      _resolve_yarn(rest, max_len)
  else:
    rest.pop('original_max_position_embeddings', None)
  fields = {}
  for field, key in _ROPE_KEYS[scaling].items():
    value = rest.pop(key, None)
    if value is not None:
      fields[field] = positive(value, key)
    elif scaling == 'llama3' or field == 'factor':
      raise ValueError(f'rope {dict(parameters)}: {key!r} is missing')
  if unknown := sorted(k for k, v in rest.items() if v is not None):
    allowed = ('rope_type', 'rope_theta', *_ROPE_KEYS[scaling].values())
    raise ValueError(
      f'rope {dict(parameters)}: {", ".join(unknown)} not supported for '
      f'{kind!r}; allowed: {", ".join(allowed)}'
    )
  if 'original_max_len' in fields:
    fields['original_max_len'] = int(fields['original_max_len'])
  return Rope(theta=theta, scaling=scaling, **fields)


def _resolve_yarn(rest, max_len):
  """Replaces the keys that only stand for others."""
  if rest.pop('truncate', True) is not True:
    raise ValueError('yarn rope with truncate=false is not supported')
  if rest.get('factor') is None:
    rest['factor'] = max_len / rest['original_max_position_embeddings']
  mscale, all_dim = rest.pop('mscale', None), rest.pop('mscale_all_dim', None)
  if rest.get('attention_factor') is None and mscale and all_dim:
    log = math.log(rest['factor']) if rest['factor'] > 1 else 0.0
    rest['attention_factor'] = (0.1 * mscale * log + 1) / (
      0.1 * all_dim * log + 1
    )


def keys(rope: Rope) -> dict[str, Any]:
  """config.json of one rotary embedding, for transformers 4 and 5."""
  parameters = parameters_of(rope)
  scaling = {k: v for k, v in parameters.items() if k != 'rope_theta'}
  return dict(
    rope_theta=rope.theta,
    rope_scaling=None if rope.scaling == 'none' else scaling,
    rope_parameters=parameters,
  )


def parameters_of(rope: Rope) -> dict[str, Any]:
  """`rope_parameters` of transformers 5."""
  out = {
    'rope_type': 'default' if rope.scaling == 'none' else rope.scaling,
    'rope_theta': rope.theta,
  }
  for field, key in _ROPE_KEYS[rope.scaling].items():
    if (value := getattr(rope, field)) is not None:
      out[key] = value
  return out


def canonical(rope: Rope) -> Rope:
  """Resets the fields that its kind of scaling does not use."""
  used = {'theta', 'scaling', *_ROPE_KEYS[rope.scaling]}
  fields = {f: getattr(rope, f) for f in used}
  return dataclasses.replace(Rope(), **fields)


def positive(value: Any, name: str) -> float:
  """Checks that a value from JSON is a number, finite and above zero."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not 0 < value < math.inf:
    raise ValueError(f'{name}={value!r} must be a number above zero')
  return float(value)
