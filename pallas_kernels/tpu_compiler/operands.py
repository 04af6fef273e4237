"""Which operands of each `pallas_call` are known numbers.

A kernel's loops may depend on scalar-prefetch data: page tables, group sizes,
masks. The traced program is evaluated as far as its known inputs and constants
reach.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jax.extend import core
import numpy as np

# Larger arrays steer nothing.
_MAX_ELEMENTS = 1 << 22
# Their inner arguments are not the outer ones.
_OPAQUE = ('scan', 'while', 'cond', 'shard_map')


@dataclasses.dataclass(frozen=True)
class PallasOperands:
  """Operands of one `pallas_call`.

  Attributes:
    name: Of the call.
    shapes: Shape and dtype name of each operand.
    values: Value of each, or `None`.
  """

  name: str
  shapes: tuple[tuple[tuple[int, ...], str], ...]
  values: tuple[np.ndarray | None, ...]


def pallas_operands(
  jaxpr: Any, values: Sequence[np.ndarray | None]
) -> list[PallasOperands]:
  """Finds every `pallas_call` of a program and the operands that are known.

  Args:
    jaxpr: Closed jaxpr of the program.
    values: Known values of its inputs, `None` where unknown.
  """
  found = []
  _evaluate(jaxpr, values, found)
  return found


def _evaluate(closed, values, found):
  """Known outputs of `closed`; appends the `pallas_call`s it meets."""
  known = {}

  def read(var):
    return var.val if hasattr(var, 'val') else known.get(var)

  for var, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
    known[var] = const if _is_small(const.shape) else None
  known.update(zip(closed.jaxpr.invars, values, strict=True))
  for eqn in closed.jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    outputs = _evaluate_equation(eqn, inputs, found)
    known.update(
      zip(eqn.outvars, outputs or [None] * len(eqn.outvars), strict=True)
    )
  return [read(v) for v in closed.jaxpr.outvars]


def _evaluate_equation(eqn, inputs, found):
  """Outputs of one equation, or `None` if they are not all known."""
  name = eqn.primitive.name
  if name == 'pallas_call':
    found.append(_record(eqn, inputs))
    return None
  inner = list(_closed_jaxprs(eqn.params.values()))
  if name not in _OPAQUE and len(inner) == 1:
    if len(inner[0].jaxpr.invars) == len(inputs):
      return _evaluate(inner[0], inputs, found)
  before = len(found)
  for part in inner:
    _evaluate(part, [None] * len(part.jaxpr.invars), found)
  if len(found) > before or any(x is None for x in inputs):
    return None
  shapes = [v.aval.shape for v in eqn.outvars if hasattr(v.aval, 'shape')]
  if not all(map(_is_small, shapes)):
    return None
  arrays = [x if hasattr(x, 'dtype') else np.asarray(x) for x in inputs]
  try:
    outputs = eqn.primitive.bind(*arrays, **eqn.params)
  except (NotImplementedError, TypeError, ValueError, RuntimeError):
    # An operation that only runs inside a compiled program: not known.
    return None
  return outputs if eqn.primitive.multiple_results else [outputs]


def _closed_jaxprs(params):
  """The jaxprs among an equation's parameters, closed."""
  for param in params:
    if isinstance(param, list | tuple):
      yield from _closed_jaxprs(param)
    elif hasattr(param, 'jaxpr') and hasattr(param, 'consts'):
      yield param
    elif hasattr(param, 'eqns'):
      yield core.ClosedJaxpr(param, ())


def _record(eqn, inputs):
  name = eqn.params.get('name') or eqn.params.get('name_and_src_info')
  return PallasOperands(
    str(name or ''),
    tuple((tuple(v.aval.shape), str(v.aval.dtype)) for v in eqn.invars),
    tuple(
      np.asarray(x) if x is not None and _is_small(np.shape(x)) else None
      for x in inputs
    ),
  )


def _is_small(shape):
  return math.prod(shape) <= _MAX_ELEMENTS
