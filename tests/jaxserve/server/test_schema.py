"""The checks agree with JSON Schema, and say what is wrong."""

import hypothesis
from hypothesis import strategies as st
import jsonschema
import pytest

from jaxserve.server import tables
from jaxserve.server.schema import Invalid
from jaxserve.server.schema import check

_BODIES = (tables.COMPLETION, tables.CHAT, tables.TOKENIZE, tables.DETOKENIZE)
_WORDS = st.sampled_from(
  ['', 'a', 'user', 'text', 'json_schema', 'none', 'auto', '12', '012', '1\n']
)
_NUMBERS = st.integers(-3, 3) | st.sampled_from(
  [-2.5, 0.5, 1.0, 2.0, 129, -101, 1e7, 2**40]
)
_KEYS = st.sampled_from(
  ['type', 'text', 'role', 'content', 'schema', 'json_schema', '1', '01', 'x']
)
_VALUES = st.recursive(
  st.none() | st.booleans() | _NUMBERS | _WORDS,
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3)
  ),
  max_leaves=5,
)


def _is_valid(value, schema):
  return jsonschema.Draft202012Validator(schema).is_valid(value)


def _agrees(value, schema):
  try:
    result = check(value, schema)
  except Invalid as e:
    assert not _is_valid(value, schema), e
  else:
    assert _is_valid(value, schema)
    assert result == value


@pytest.mark.parametrize('body', _BODIES, ids=lambda b: b.name)
def test_tables_are_schemas(body):
  jsonschema.Draft202012Validator.check_schema(body.schema)


@pytest.mark.parametrize('body', _BODIES, ids=lambda b: b.name)
@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_every_parameter_agrees_with_json_schema(body, data):
  for name, schema in body.schema['properties'].items():
    value = data.draw(_VALUES, label=name)
    _agrees(value, schema)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.dictionaries(st.text('abc', max_size=2), _VALUES))
def test_objects_agree_with_json_schema(value):
  schema = {
    'type': 'object',
    'properties': {
      'a': {'type': ['integer', 'null'], 'exclusiveMinimum': -1},
      'b': {'type': 'array', 'items': {'type': 'string', 'maxLength': 2}},
      'c': {'enum': [1, False, None, 'a', []]},
    },
    'patternProperties': {'^a[ab]$': {'type': 'number', 'maximum': 1}},
    'required': ['a'],
    'additionalProperties': False,
  }
  _agrees(value, schema)


def test_whole_numbers_become_integers():
  got = check({'a': [2.0]}, {
    'type': 'object',
    'properties': {'a': {'type': 'array', 'items': {'type': 'integer'}}},
  })  # fmt: skip
  assert got == {'a': [2]} and isinstance(got['a'][0], int)
  assert isinstance(check(2.0, {'type': ['null', 'number']}), float)


@pytest.mark.parametrize('body', _BODIES[:2], ids=lambda b: b.name)
def test_values_that_ask_for_nothing(body):
  """`null` is the default, and clients send defaults."""
  properties = body.schema['properties']
  given = {name: None for name in properties}
  given |= (
    {'model': 'm', 'prompt': 'x'}
    if 'prompt' in given
    else {
      'model': 'm',
      'messages': [{'role': 'user', 'content': 'x'}],
    }
  )
  needed = {name: given[name] for name in body.schema['required']}
  assert body.parse(given) == body.parse(needed)
  defaults = {n: s['default'] for n, s in properties.items() if 'default' in s}
  assert body.parse(needed | defaults) == body.parse(needed)
