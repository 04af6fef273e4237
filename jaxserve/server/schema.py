"""Checks values against the part of JSON Schema that the server speaks.

The same schemas go into `/openapi.json`, so that what is described and what is
accepted cannot differ. https://json-schema.org/draft/2020-12, of which these
keywords are known: type, enum, anyOf, minimum, maximum, exclusiveMinimum,
minLength, maxLength, items, minItems, maxItems, properties, required,
additionalProperties, patternProperties (with additionalProperties false).
"""

from collections.abc import Mapping
import difflib
import re
from typing import Any

Schema = Mapping[str, Any]

_KINDS = {
  'null': 'null',
  'boolean': 'true or false',
  'integer': 'an integer',
  'number': 'a number',
  'string': 'a text',
  'array': 'a list',
  'object': 'an object',
}


class Invalid(ValueError):
  """A value that a schema does not allow.

  Args:
    path: Where it is, such as 'messages[0].role'.
    problem: What is wrong with it.
    is_other: Whether the value is plainly meant for another schema: it differs
      in the one word that tells them apart.
  """

  def __init__(self, path: str, problem: str, is_other: bool = False):
    super().__init__(f'{path or "the body"} {problem}')
    self.path = path
    self.is_other = is_other


def check(value: Any, schema: Schema, path: str = '') -> Any:
  """Returns the value, its whole numbers as `int` where these are wanted.

  Raises:
    Invalid: The schema does not allow it.
  """
  if 'anyOf' in schema:
    return _check_any(value, schema, path)
  kind = _check_type(value, schema, path)
  if 'enum' in schema and not any(_same(value, x) for x in schema['enum']):
    allowed = ', '.join(_show(x) for x in schema['enum'])
    raise Invalid(
      path,
      f'must be one of {allowed}, not {_show(value)}',
      is_other=len(schema['enum']) == 1,
    )
  if kind in ('integer', 'number'):
    _check_number(value, schema, path)
    return int(value) if kind == 'integer' else value
  if kind == 'string':
    _check_size(value, schema, path, 'Length', 'characters')
  if kind == 'array':
    _check_size(value, schema, path, 'Items', 'items')
    items = schema.get('items')
    if items is not None:
      return [check(x, items, f'{path}[{i}]') for i, x in enumerate(value)]
  if kind == 'object':
    return _check_object(value, schema, path)
  return value


def _check_any(value, schema, path):
  errors = []
  for option in schema['anyOf']:
    try:
      return check(value, option, path)
    except Invalid as e:
      errors.append(e)
  # Where one option is clearly meant, what is wrong with it is said.
  inner = [e for e in errors if e.path != path and not e.is_other]
  if len(inner) == 1:
    raise inner[0]
  raise Invalid(path, f'must be {schema["description"]}, not {_show(value)}')


def _check_type(value, schema, path):
  kinds = schema.get('type', ())
  kinds = (kinds,) if isinstance(kinds, str) else kinds
  for kind in kinds:
    if _is(kind, value):
      return kind
  if kinds:
    wanted = ' or '.join(_KINDS[k] for k in kinds)
    raise Invalid(path, f'must be {wanted}, not {_show(value)}')
  return None


def _is(kind, value):
  if kind == 'null':
    return value is None
  if isinstance(value, bool):
    return kind == 'boolean'
  if kind == 'integer':
    return isinstance(value, int) or (
      isinstance(value, float) and value.is_integer()
    )
  classes = dict(number=(int, float), string=str, array=list, object=dict)
  return kind in classes and isinstance(value, classes[kind])


def _same(a, b):
  return a == b and isinstance(a, bool) == isinstance(b, bool)


def _check_number(value, schema, path):
  if 'minimum' in schema and value < schema['minimum']:
    raise Invalid(path, f'must be at least {schema["minimum"]}, not {value}')
  if 'maximum' in schema and value > schema['maximum']:
    raise Invalid(path, f'must be at most {schema["maximum"]}, not {value}')
  low = schema.get('exclusiveMinimum')
  if low is not None and value <= low:
    raise Invalid(path, f'must be above {low}, not {value}')


def _check_size(value, schema, path, what, unit):
  low, high = schema.get(f'min{what}', 0), schema.get(f'max{what}')
  if len(value) < low:
    raise Invalid(path, f'must have at least {low} {unit}, not {len(value)}')
  if high is not None and len(value) > high:
    raise Invalid(path, f'must have at most {high} {unit}, not {len(value)}')


def _check_object(value, schema, path):
  prefix = f'{path}.' if path else ''
  properties = schema.get('properties', {})
  result = {}
  for name, x in value.items():
    if name in properties:
      result[name] = check(x, properties[name], f'{prefix}{name}')
  for name in value.keys() - properties.keys():
    where = f'{prefix}{name}'
    result[name] = _check_other(value[name], schema, name, where)
  for name in schema.get('required', ()):
    if name not in value:
      raise Invalid(f'{prefix}{name}', 'is required')
  return result


def _check_other(value, schema, name, path):
  """A member that is not among the properties."""
  for pattern, inner in schema.get('patternProperties', {}).items():
    if re.fullmatch(pattern, name):
      return check(value, inner, path)
  if schema.get('additionalProperties', True):
    return value
  near = difflib.get_close_matches(name, schema.get('properties', ()), 1)
  hint = f'; did you mean {near[0]}?' if near else ''
  raise Invalid(path, f'is not a known parameter{hint}')


def _show(value):
  if value is None or isinstance(value, bool):
    return {None: 'null', True: 'true', False: 'false'}[value]
  return f'{value!r:.60}'
