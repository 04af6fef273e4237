"""What a config names, looked up: algorithms, rules, dtypes, published models.

Everything unknown is refused with a list of what is known.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxtrain.models import families
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import ShardingRules


def named(
  family: Any, what: str, options: Mapping[str, Any], **arguments: Any
) -> Any:
  """Calls the function of a family that `options` names with the rest.

  Args:
    family: Package with `get` and `names`, such as `jaxtrain.optimizers`.
    what: What it is called in messages.
    options: {'name': file of the family, and its arguments}.
    **arguments: More of them.
  """
  options = dict(options)
  if 'name' not in options:
    raise ValueError(
      f"{what} has no 'name'; known: {', '.join(family.names())}"
    )
  name = options.pop('name')
  function = family.get(name)
  try:
    return function(**arguments, **options)
  except TypeError as e:
    raise ValueError(f'{what} {name!r}: {e}') from e


def sharding_rules(rules: str | Mapping[str, Any]) -> ShardingRules:
  """Rules by the name of a preset, or of the arguments of `ShardingRules`."""
  if not isinstance(rules, str):
    return ShardingRules(**rules)
  if rules not in PRESETS:
    raise ValueError(f'unknown rules {rules!r}; known: {", ".join(PRESETS)}')
  return PRESETS[rules]


def float_dtype(name: str, value: str) -> jnp.dtype:
  """The dtype that the option `name` has been given."""
  known = ('float32', 'bfloat16', 'float16')
  if value not in known:
    raise ValueError(f'{name}={value!r} is not one of {", ".join(known)}')
  return jnp.dtype(value)


def published(name: str) -> ModelConfig:
  """Sizes of a published model, such as 'llama3-8b'."""
  sizes = {}
  for family in families.names():
    sizes.update(families.get(family).sizes)
  if name not in sizes:
    raise ValueError(f'unknown preset {name!r}; known: {", ".join(sizes)}')
  return sizes[name]
