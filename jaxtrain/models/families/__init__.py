"""Published families of decoders: what their config.json and tensors mean.

`names()` lists them, one file each; `get(name)` is the family's `Family`
record; `find(config_json)` is the family of a checkpoint.
"""

from collections.abc import Mapping
import functools
from typing import Any

from jaxtrain import registry
from jaxtrain.models.families.base import Family
from jaxtrain.models.families.base import Weight

__all__ = ['Family', 'Weight', 'find', 'get', 'names']

names = functools.partial(registry.names, __name__)
get = functools.partial(registry.get, __name__)


def find(config_json: Mapping[str, Any]) -> Family:
  """Returns the family of a Hugging Face config.json.

  Raises:
    ValueError: `model_type` is missing or of no known family.
  """
  model_type = str(config_json.get('model_type'))
  known = {}
  for name in names():
    family = get(name)
    known.update({t: family for t in family.model_types})
  if model_type not in known:
    raise ValueError(
      f'config.json: model_type={model_type!r} is of no known family; known: '
      f'{", ".join(sorted(known))}'
    )
  return known[model_type]
