"""Pickles functions for a process that has the same packages.

cloudpickle sends closures and what `__main__` defines by value. jax's wrappers
of functions (`jit`, `custom_vjp`) are no functions, and not all can be sent so:
those that a module names go by that name, custom derivatives by what they hold.
"""

import importlib
import io
import operator
import sys
import types
from typing import Any

import cloudpickle
import jax


def dumps(obj: Any) -> bytes:
  """Pickles `obj`; `pickle.loads` reads it.

  Raises:
    ValueError: Something in it cannot be sent, such as a device.
  """
  buffer = io.BytesIO()
  try:
    _Pickler(buffer).dump(obj)
  except (TypeError, AttributeError, RuntimeError) as e:
    raise ValueError(
      f'the function cannot be sent to the compiling process: {e}. If it holds '
      'devices, a mesh or shardings, make it in `compile_built`'
    ) from e
  return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):
  def reducer_override(self, obj):
    is_plain = isinstance(obj, type | types.FunctionType)
    if is_plain or not hasattr(obj, '__wrapped__'):
      return super().reducer_override(obj)
    module = getattr(obj, '__module__', None) or '__main__'
    name = getattr(obj, '__qualname__', '')
    if module != '__main__' and _named(module, name) is obj:
      return _by_name, (module, name)
    if isinstance(obj, jax.custom_vjp | jax.custom_jvp):
      return _blank, (type(obj),), vars(obj)
    return super().reducer_override(obj)


def _named(module, name):
  try:
    return operator.attrgetter(name)(sys.modules[module])
  except (AttributeError, KeyError):
    return None


def _by_name(module, name):
  return operator.attrgetter(name)(importlib.import_module(module))


def _blank(cls):
  """An instance whose attributes are still to come."""
  return object.__new__(cls)
