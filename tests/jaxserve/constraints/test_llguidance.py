"""Masks against enumerated languages; what they let through against checkers.

Willard and Louf, https://arxiv.org/abs/2307.09702, section 3: a token may come
next if the text with it is the beginning of a text of the language.
"""

import concurrent.futures
import json
import re
import sys
import types

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jsonschema
import numpy as np
import pytest

from jaxserve import constraints
from jaxserve.constraints import base
from jaxserve.constraints import llguidance
from jaxtrain.checkpoints.tokenizer import ByteTokenizer

_CONSTRAINT = constraints.get('llguidance')()


def _start(vocabulary, **kwargs):
  grammar = _CONSTRAINT.compile(vocabulary.tokenizer, vocabulary.size, **kwargs)
  return grammar.start()


def _sample(vocabulary, matcher, rng, limit=5000):
  """Random tokens of the mask, until the end."""
  ids = []
  stop_ids = set(vocabulary.tokenizer.stop_ids)
  while not matcher.is_done:
    allowed = vocabulary.allowed(matcher.mask())
    assert allowed and matcher.error is None
    token = int(rng.choice(sorted(allowed)))
    assert matcher.accept(token)
    if token in stop_ids:
      break
    ids.append(token)
    assert len(ids) < limit
  assert vocabulary.allowed(matcher.mask()) == stop_ids
  return ids


_WORDS = st.lists(
  st.text('ab"é世☃ \\', max_size=5), min_size=1, max_size=4, unique=True
)


@given(words=_WORDS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_masks_of_an_enumerated_language(vocabulary, words, seed):
  rng = np.random.default_rng(seed)
  matcher = _start(vocabulary, regex='|'.join(map(re.escape, words)))
  language = [w.encode() for w in words]
  stop_ids = set(vocabulary.tokenizer.stop_ids)
  text = b''
  while True:
    expected = {
      v
      for v, x in enumerate(vocabulary.bytes)
      if x is not None and any(w.startswith(text + x) for w in language)
    }
    assert matcher.is_done == (not expected)
    if text in language:
      expected |= stop_ids
    allowed = vocabulary.allowed(matcher.mask())
    left = {w[len(text) :][:1] for w in language if w.startswith(text)}
    if len(left) == 1 and text not in language:
      # One byte can follow: of its tokens, the tokenizer's own may be chosen.
      assert allowed and allowed <= expected
    else:
      assert allowed == expected
    for token in (*range(0, vocabulary.size, 7), -1, vocabulary.size, 10**6):
      if token not in expected:
        assert not matcher.accept(token)
    # Refusals have changed nothing.
    assert vocabulary.allowed(matcher.mask()) == allowed
    token = int(rng.choice(sorted(allowed)))
    assert matcher.accept(token)
    if token in stop_ids:
      break
    text += vocabulary.bytes[token]
  assert text in language
  assert matcher.is_done and matcher.error is None
  assert vocabulary.allowed(matcher.mask()) == stop_ids


@pytest.mark.parametrize(
  'regex',
  [
    r'[a-z]+@[a-z]+\.(com|org)',
    r'(é|☃|世界){2,4}',
    r'[0-9]{3}-[0-9]{4}',
    r'[^"\\]{0,9}',
    r'(?s:.){1,4}!',
    r'^a/b#"\n$',
    r'',
  ],
)
def test_what_is_drawn_matches_the_expression(vocabulary, regex):
  rng = np.random.default_rng(0)
  for _ in range(10):
    ids = _sample(vocabulary, _start(vocabulary, regex=regex), rng)
    # Bytes of half a character would not decode.
    assert re.fullmatch(regex, vocabulary.text(ids))


def _schemas():
  integers = st.tuples(st.integers(-50, 50), st.integers(0, 40)).map(
    lambda x: dict(type='integer', minimum=x[0], maximum=x[0] + x[1])
  )
  strings = st.integers(0, 3).map(
    lambda n: dict(type='string', minLength=n, maxLength=n + 3)
  )
  leaves = st.one_of(
    integers,
    strings,
    st.sampled_from(
      [
        dict(type='integer'),
        dict(type='number'),
        dict(type='boolean'),
        dict(type='null'),
        dict(type='string', pattern='^[a-z]{1,3}é?$'),
        dict(type='string', format='date'),
        dict(enum=['é"\\', 1, None, [2, 'x']]),
        dict(const={'a': 'b'}),
      ]
    ),
  )

  def larger(inner):
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
      lambda x: dict(
        type='array', items=x[0], minItems=x[1], maxItems=x[1] + x[2]
      )
    )
    objects = st.dictionaries(
      st.sampled_from(['a', 'name', 'é"']), inner, max_size=3
    ).flatmap(
      lambda p: st.sets(st.sampled_from([*p] or ['a'])).map(
        lambda required: dict(
          type='object',
          properties=p,
          required=sorted(required & {*p}),
          additionalProperties=False,
        )
      )
    )
    return (
      arrays
      | objects
      | st.lists(inner, min_size=1, max_size=2).map(lambda x: dict(anyOf=x))
    )

  return st.recursive(leaves, larger, max_leaves=5)


@given(schema=_schemas(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_what_is_drawn_is_json_of_the_schema(vocabulary, schema, seed):
  ids = _sample(
    vocabulary,
    _start(vocabulary, json_schema=schema),
    np.random.default_rng(seed),
  )
  value = json.loads(vocabulary.text(ids))
  jsonschema.Draft202012Validator(schema).validate(value)


@given(schema=_schemas(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_what_the_tokenizer_makes_of_json_is_accepted(vocabulary, schema, seed):
  """All of the language is reached, as models write it."""
  ids = _sample(
    vocabulary,
    _start(vocabulary, json_schema=schema),
    np.random.default_rng(seed),
  )
  text = json.dumps(json.loads(vocabulary.text(ids)), ensure_ascii=False)
  matcher = _start(vocabulary, json_schema=json.dumps(schema))
  for token in vocabulary.tokenizer.encode(text):
    assert matcher.accept(token), (text, token)
  assert matcher.accept(vocabulary.tokenizer.eos_id)


def test_recursive_schemas(vocabulary):
  schema = {
    '$defs': {
      'tree': {
        'type': 'array',
        'maxItems': 2,
        'items': {'$ref': '#/$defs/tree'},
      }
    },
    '$ref': '#/$defs/tree',
  }
  rng = np.random.default_rng(0)
  ids = _sample(vocabulary, _start(vocabulary, json_schema=schema), rng)
  jsonschema.validate(json.loads(vocabulary.text(ids)), schema)


def test_whitespace_ends(vocabulary):
  matcher = _start(vocabulary, json_schema=dict(type='object'))
  space, brace = (vocabulary.tokenizer.encode(x)[0] for x in ' }')
  assert matcher.accept(vocabulary.tokenizer.encode('{')[0])
  count = 0
  while matcher.accept(space):
    count += 1
    assert count < 100
  assert count >= 16
  assert matcher.accept(brace)


def test_interleaved_matchers_do_not_disturb_each_other(vocabulary):
  schema = dict(
    type='object',
    properties=dict(a=dict(type='string', maxLength=9), n=dict(type='number')),
    required=['a', 'n'],
  )
  grammar = _CONSTRAINT.compile(
    vocabulary.tokenizer, vocabulary.size, json_schema=schema
  )
  texts = [
    _sample(vocabulary, grammar.start(), np.random.default_rng(i))
    for i in range(6)
  ]

  def masks(ids):
    matcher = grammar.start()
    out = [matcher.mask()]
    for i in ids:
      assert matcher.accept(i)
      out.append(matcher.mask())
    return out

  alone = [masks(ids) for ids in texts]
  matchers = [grammar.start() for _ in texts]
  for step in range(max(map(len, texts)) + 1):
    for ids, matcher, expected in zip(texts, matchers, alone, strict=True):
      if step <= len(ids):
        np.testing.assert_array_equal(matcher.mask(), expected[step])
      if step < len(ids):
        assert matcher.accept(ids[step])
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for expected, actual in zip(alone, pool.map(masks, texts), strict=True):
      np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
  'kwargs, wrong',
  [
    (dict(regex='(a'), 'unclosed group'),
    (dict(regex='(?=a)b'), 'look-around'),
    (dict(regex='[^\\x00-\\U0010FFFF]'), 'nothing matches'),
    (dict(regex='\ud800'), 'surrogates'),
    (dict(json_schema='{"type": '), 'EOF'),
    (dict(json_schema='[]'), 'object'),
    (dict(json_schema={'type': 'nope'}), 'Invalid type'),
    (dict(json_schema={'not': {}}), 'Unimplemented'),
    (dict(json_schema={'$ref': 'http://example.com/x'}), 'not present'),
    (dict(json_schema={'enum': []}), 'nsatisfiable'),
  ],
)
def test_what_cannot_be_compiled_is_named(kwargs, wrong):
  with pytest.raises(ValueError, match=wrong) as caught:
    _CONSTRAINT.compile(ByteTokenizer(), 264, **kwargs)
  assert next(iter(kwargs)) in str(caught.value)


def test_one_of_both_is_given():
  for kwargs in ({}, dict(regex='a', json_schema={})):
    with pytest.raises(ValueError, match='one of'):
      _CONSTRAINT.compile(ByteTokenizer(), 264, **kwargs)


def test_schemas_may_be_read_only(vocabulary):
  inner = types.MappingProxyType(dict(type='null'))
  schema = types.MappingProxyType(dict(type='array', items=inner))
  matcher = _start(vocabulary, json_schema=schema)
  for token in vocabulary.tokenizer.encode('[null]'):
    assert matcher.accept(token)


def test_what_was_compiled_is_kept():
  constraint = constraints.get('llguidance')(max_grammars=2)
  tokenizer = ByteTokenizer()
  compiled = lambda x: constraint.compile(tokenizer, 264, regex=x)
  first = compiled('a')
  assert compiled('a') is first
  assert compiled('b') is not first
  compiled('a'), compiled('c')
  assert compiled('a') is first
  assert constraint.compile(tokenizer, 300, regex='a') is not first
  compiled('d'), compiled('e')
  assert compiled('a') is not first


def test_other_tokenizers_are_refused():
  class Other(ByteTokenizer.__base__):
    vocab_size, stop_ids = 5, ()

  with pytest.raises(ValueError, match='ByteTokenizer or an HFTokenizer'):
    _CONSTRAINT.compile(Other(), 5, regex='a')


def test_without_stop_tokens_a_text_ends_where_nothing_follows():
  class NoStops(ByteTokenizer):
    stop_ids = ()

  compiled = _CONSTRAINT.compile(NoStops(), 264, regex='ab?')
  matcher = compiled.start()
  for letter in b'ab':
    assert not matcher.is_done
    np.testing.assert_array_equal(
      np.flatnonzero(
        np.unpackbits(matcher.mask().view(np.uint8), bitorder='little')
      ),
      [letter],
    )
    assert matcher.accept(letter)
  assert matcher.is_done
  assert not matcher.mask().any()


@pytest.fixture
def exponential(monkeypatch):
  """A grammar with a state for each text of 30 letters, and room for few."""
  monkeypatch.setattr(llguidance, '_MAX_STATES', 200)
  return constraints.get('llguidance')().compile(
    ByteTokenizer(), 264, regex='[ab]*a[ab]{30}c|d'
  )


def _letters(count, seed=0):
  return np.random.default_rng(seed).choice([*b'ab'], count).tolist()


def _is_in_mask(matcher, token):
  return bool(matcher.mask()[token // 32] >> (token % 32) & 1)


def test_a_grammar_that_grows_too_complex_ends_in_an_error(exponential):
  matcher = exponential.start()
  for token in _letters(1000):
    if not _is_in_mask(matcher, token) or not matcher.accept(token):
      break
  assert 'too many states' in matcher.error
  assert not matcher.is_done
  assert not matcher.mask().any()
  assert not matcher.accept(ord('a'))


def test_others_go_on_when_one_has_filled_what_they_share(exponential):
  # None of them has more states than there is room for.
  texts = [_letters(100, seed) for seed in range(5)]
  matchers = [exponential.start() for _ in texts]
  for tokens in zip(*texts, strict=True):
    for matcher, token in zip(matchers, tokens, strict=True):
      assert _is_in_mask(matcher, token)
      assert matcher.accept(token)
      assert not matcher.accept(ord('d'))
  for text, matcher in zip(texts, matchers, strict=True):
    may_end = text[-31] == ord('a')
    assert _is_in_mask(matcher, ord('c')) == may_end
    assert matcher.accept(ord('c')) == may_end
    assert matcher.is_done == may_end
  late = exponential.start()
  assert late.accept(ord('d')) and late.is_done


def test_the_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'llguidance', None)
  constraint = constraints.get('llguidance')()
  with pytest.raises(ValueError, match=r'onemesh\[constraints\]'):
    constraint.compile(ByteTokenizer(), 264, regex='a')


def test_protocols():
  assert isinstance(_CONSTRAINT, base.Constraint)
  grammar = _CONSTRAINT.compile(ByteTokenizer(), 264, regex='a')
  assert isinstance(grammar, base.Grammar)
  assert isinstance(grammar.start(), base.Matcher)
