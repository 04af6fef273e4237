"""`ModelConfig` to JSON and back, exactly.

Every field is written, defaults too, so that a checkpoint means the same after
a default has changed. A field that a later version adds takes its default; one
that this version does not know is an error, for ignoring it would build another
model.
"""

import dataclasses
import types
import typing
from typing import Any

from jaxtrain.models.config import ModelConfig


def to_json(config: ModelConfig) -> dict[str, Any]:
  """Dict of JSON types; nested dataclasses are dicts and tuples lists."""
  return _plain(dataclasses.asdict(config))


def from_json(value: dict[str, Any]) -> ModelConfig:
  """Inverse of `to_json`.

  Raises:
    ValueError: Not a dict, an unknown or missing field, or values that
      `ModelConfig` refuses.
  """
  return _build(ModelConfig, value, 'ModelConfig')


def _plain(value):
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _build(cls, value, where):
  if not isinstance(value, dict):
    raise ValueError(f'{where} must be a JSON object, not {value!r}')
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if unknown := sorted(set(value) - set(fields)):
    raise ValueError(
      f'{where} has no field {", ".join(unknown)}; known: {", ".join(fields)}'
    )
  missing = [
    n
    for n, f in fields.items()
    if n not in value
    and f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f'{where} lacks {", ".join(missing)}')
  hints = typing.get_type_hints(cls)
  return cls(
    **{k: _convert(hints[k], v, f'{where}.{k}') for k, v in value.items()}
  )


def _convert(hint, value, where):
  if isinstance(hint, types.UnionType):
    if value is None:
      return None
    (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, where)
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, list):
      raise ValueError(f'{where} must be a list, not {value!r}')
    return tuple(value)
  # JSON has one kind of number, so 10000.0 may come back from others as 10000.
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise ValueError(
      f'{where}={value!r} must be {hint.__name__}, not {type(value).__name__}'
    )
  return value
