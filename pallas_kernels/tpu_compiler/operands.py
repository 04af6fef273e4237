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
# They say where a value is, and leave it as it is.
_SAME = ('mesh_cast', 'pcast', 'pvary', 'reshard', 'sharding_constraint')


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
  if name in _SAME:
    return inputs
  if name == 'platform_index':
    return [_tpu_index(eqn.params['platforms'])]
  if name in _INNER_INPUTS:
    parts = list(_closed_jaxprs(eqn.params.values()))
    if name == 'cond' and inputs[0] is not None:
      index = int(inputs[0])
      parts = [parts[min(max(index, 0), len(parts) - 1)]]
    outputs = [
      _evaluate(part, _INNER_INPUTS[name](eqn, part, inputs), found)
      for part in parts
    ]
    return _OUTER_OUTPUTS[name](eqn, outputs)
  inner = list(_closed_jaxprs(eqn.params.values()))
  if len(inner) == 1 and len(inner[0].jaxpr.invars) == len(inputs):
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
  except Exception:
    # An operation that only runs inside a compiled program: not known.
    return None
  return outputs if eqn.primitive.multiple_results else [outputs]


def _tpu_index(platforms):
  """Which branch of `platform_dependent` a TPU takes."""
  for i, names in enumerate(platforms):
    if names is None or 'tpu' in names:
      return np.int32(i)
  return None


def _scan_inputs(eqn, part, inputs):
  """Constants, no carry, and of what is scanned what is always the same."""
  num_consts, num_carry = _scan_sizes(eqn.params)
  scanned = [
    x[0] if x is not None and len(x) and np.all(x == x[:1]) else None
    for x in map(_array, inputs[num_consts + num_carry :])
  ]
  return [*inputs[:num_consts], *[None] * num_carry, *scanned]


def _while_inputs(eqn, part, inputs):
  """Constants of the condition or of the body; no carry."""
  num_cond = eqn.params['cond_nconsts']
  num_body = eqn.params['body_nconsts']
  known = inputs[:num_cond]
  if part is not eqn.params['cond_jaxpr']:
    known = inputs[num_cond : num_cond + num_body]
  return [*known, *[None] * (len(part.jaxpr.invars) - len(known))]


def _shard_map_inputs(eqn, part, inputs):
  """The first device's part of each."""
  return [
    None if x is None else x[tuple(slice(n) for n in var.aval.shape)]
    for x, var in zip(map(_array, inputs), part.jaxpr.invars, strict=True)
  ]


# Their inner arguments are not the outer ones.
_INNER_INPUTS = {
  'cond': lambda eqn, part, inputs: inputs[1:],
  'scan': _scan_inputs,
  'shard_map': _shard_map_inputs,
  'while': _while_inputs,
}


def _scan_sizes(params):
  """Numbers of constants and of carried values; since jax 0.12 in a tree."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  consts, carry, _ = params['ft_in'].unpack()
  return len(consts), len(carry)


def _scan_outputs(eqn, outputs):
  """Of what every round puts out, what is always the same."""
  _, num_carry = _scan_sizes(eqn.params)
  return [
    None if i < num_carry else _fill(y, var.aval.shape)
    for i, (y, var) in enumerate(zip(outputs[0], eqn.outvars, strict=True))
  ]


def _shard_map_outputs(eqn, outputs):
  """The first device's part, as if all had the same."""
  return [
    _fill(y, var.aval.shape)
    for y, var in zip(outputs[0], eqn.outvars, strict=True)
  ]


def _cond_outputs(eqn, outputs):
  """What the branches that know it agree on."""
  agreed = []
  for values in zip(*outputs, strict=True):
    known = [np.asarray(v) for v in values if v is not None]
    same = known and all(np.array_equal(known[0], v) for v in known)
    agreed.append(known[0] if same else None)
  return agreed


_OUTER_OUTPUTS = {
  'cond': _cond_outputs,
  'scan': _scan_outputs,
  'shard_map': _shard_map_outputs,
  'while': lambda eqn, outputs: None,
}


def _fill(y, shape):
  """Repeats an array until it has a shape."""
  if y is None or not _is_small(shape):
    return None
  y = np.asarray(y)
  y = y.reshape((1,) * (len(shape) - y.ndim) + y.shape)
  return np.tile(
    y, [whole // part for whole, part in zip(shape, y.shape, strict=True)]
  )


def _array(x):
  return None if x is None else np.asarray(x)


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
