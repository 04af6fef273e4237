"""Experiment records: each file has `get_config()`, the arguments of a run.

A config is a plain dict of the keyword arguments of `experiments.training.run`;
its file's docstring says what it is for, how to start it and what came out.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import pkgutil
from typing import Any


def names() -> list[str]:
  """Names of the configs in this folder."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Reads a config and changes some of its values.

  Args:
    spec: Name of a file in this folder, or the path of a Python file.
    overrides: 'key=value' each, the value JSON or else a string; dots reach
      into nested values: 'optimizer.b2=0.99', 'model.num_layers=2'.

  Returns:
    The config.

  Raises:
    ValueError: No such config, one without `get_config`, or an override that
      does not fit.
  """
  path = pathlib.Path(spec)
  if spec in names():
    path = pathlib.Path(__file__).with_name(f'{spec}.py')
  if path.suffix != '.py' or not path.is_file():
    raise ValueError(
      f'no config {spec!r}: give the path of a .py file, or one of '
      f'{", ".join(names())}'
    )
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path} has no get_config()')
  config = dict(module.get_config())
  for override in overrides:
    key, equals, value = override.partition('=')
    if not equals:
      raise ValueError(f'override {override!r} is not key=value')
    config = _replace(config, key.split('.'), _parse(value), override)
  return config


def check(
  config: Mapping[str, Any], function: Any, options: Sequence[str] = ()
) -> None:
  """Checks that a config's keys are keyword arguments of `function`.

  Args:
    config: Keyword arguments.
    function: Their function.
    options: Names that its `**options` may hold.

  Raises:
    ValueError: An unknown or a missing key; lists what there is.
  """
  parameters = {
    name: p
    for name, p in inspect.signature(function).parameters.items()
    if p.kind is p.KEYWORD_ONLY
  }
  known = (*parameters, *options)
  if unknown := [name for name in config if name not in known]:
    raise ValueError(
      f'config has unknown {", ".join(unknown)}; known: {", ".join(known)}'
    )
  needed = [n for n, p in parameters.items() if p.default is p.empty]
  if missing := [name for name in needed if name not in config]:
    raise ValueError(f'config lacks {", ".join(missing)}')


def _parse(value):
  try:
    return json.loads(value)
  except json.JSONDecodeError:
    return value


def _replace(node, keys, value, override):
  """`node` with the value at the end of `keys` replaced."""
  key, *rest = keys
  if dataclasses.is_dataclass(node):
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    if key not in fields:
      raise ValueError(
        f'override {override!r}: {type(node).__name__} has no {key!r}; known: '
        f'{", ".join(fields)}'
      )
    if rest:
      value = _replace(fields[key], rest, value, override)
    elif isinstance(value, list):
      value = tuple(value)
    return dataclasses.replace(node, **{key: value})
  if not isinstance(node, Mapping):
    raise ValueError(f'override {override!r}: {key!r} is inside {node!r}')
  if rest:
    value = _replace(node.get(key, {}), rest, value, override)
  return {**node, key: value}
