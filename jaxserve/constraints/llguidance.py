"""Grammars through llguidance: derivatives for words, Earley's parser above.

Moskal et al., https://github.com/guidance-ai/llguidance. Masks of a grammar are
those of Willard and Louf, "Efficient Guided Generation for Large Language
Models", https://arxiv.org/abs/2307.09702, section 3, but computed where they
are needed: by a walk over the tree of the tokens' bytes, so that tokens which
end within a character are nothing special.

Schemas are read as https://json-schema.org, draft 2020-12; keywords that
llguidance does not enforce are refused rather than ignored. Properties come in
the order of the schema. Between the words of JSON is at most `_WHITESPACE`, so
that a model cannot go on with spaces for ever. Regular expressions are in the
syntax of Rust's regex, without looking around. Where but one text can follow,
the mask has the tokens that the tokenizer itself would choose for it.
"""

from collections.abc import Mapping
import functools
import json
from typing import Any

import numpy as np

from jaxserve.constraints.base import Constraint
from jaxtrain.checkpoints.tokenizer import ByteTokenizer
from jaxtrain.checkpoints.tokenizer import HFTokenizer
from jaxtrain.checkpoints.tokenizer import Tokenizer

_WHITESPACE = r'[ \t\r\n]{0,32}'
_NUM_TOKENIZERS = 4
_MAX_STATES = 2**16  # Of a lexer; each takes 1 to 2 kB.
_SHOWN = 200  # Characters of a text that an error message shows.


def llguidance(max_grammars: int = 64) -> Constraint:
  """The constraint.

  Args:
    max_grammars: Compiled grammars to keep, the last used ones.
  """
  return LLGuidance(max_grammars)


class LLGuidance:
  """Compiles through llguidance, which is imported only then."""

  def __init__(self, max_grammars: int):
    self._vocabulary = functools.lru_cache(_NUM_TOKENIZERS)(_Vocabulary)
    self._grammar = functools.lru_cache(max_grammars)(_Grammar)

  def compile(
    self,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
  ) -> '_Grammar':
    """See `base.Constraint`."""
    if (json_schema is None) == (regex is None):
      raise ValueError(f'give one of {json_schema=} and {regex=}')
    vocabulary = self._vocabulary(tokenizer, vocab_size)
    if regex is not None:
      return self._grammar(vocabulary, 'regex', regex)
    return self._grammar(vocabulary, 'json_schema', _schema_text(json_schema))


class _Vocabulary:
  """The tokens of a tokenizer, as llguidance sees them."""

  def __init__(self, tokenizer: Tokenizer, vocab_size: int):
    library = _library()
    size = max(vocab_size, tokenizer.vocab_size)
    # Without stop tokens a text ends with one that is never drawn.
    self.stop_ids = [i for i in tokenizer.stop_ids if i < vocab_size]
    stop_ids = self.stop_ids or [size]
    size += not self.stop_ids
    if isinstance(tokenizer, ByteTokenizer):
      tokens = library.TokenizerWrapper(_Bytes(tokenizer, size))
    elif isinstance(tokenizer, HFTokenizer):
      tokens = tokenizer.to_json()
    else:
      raise ValueError(
        f'json_schema and regex need a ByteTokenizer or an HFTokenizer, got '
        f'{tokenizer!r}'
      )
    try:
      self.tokens = library.LLTokenizer(
        tokens, n_vocab=size, eos_token=stop_ids
      )
    except ValueError as e:
      raise ValueError(
        f'json_schema and regex do not work with {tokenizer!r}: {e}'
      ) from e
    self.num_tokens = vocab_size
    self._num_words = -(-self.tokens.vocab_size // 32)
    inside = np.zeros(-(-vocab_size // 32) * 32, bool)
    inside[:vocab_size] = True
    self._inside = np.packbits(inside, bitorder='little').view('<u4')

  def mask(self, matcher: Any) -> np.ndarray:
    """What may follow; nothing if the matcher fails."""
    mask = np.zeros(self._num_words, np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
      mask[:] = 0
    return mask[: len(self._inside)] & self._inside


class _Bytes:
  """`ByteTokenizer` as `llguidance.TokenizerWrapper` wants it."""

  def __init__(self, tokenizer: ByteTokenizer, size: int):
    self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    self.special_token_ids = range(256, size)
    self.tokens = [bytes([i]) for i in range(256)]
    self.tokens += [f'<{i}>'.encode() for i in self.special_token_ids]

  def __call__(self, text: bytes) -> list[int]:
    return list(text)


class _Grammar:
  """A matcher that never moves, to copy.

  Copies share the states of the lexer that any of them has reached, behind a
  lock: what one has paid for is free for the others. There is room for
  `_MAX_STATES`. When it is full, those who need more get lexers of their own.

  Args:
    vocabulary: The tokens.
    kind: 'regex' or 'json_schema'.
    text: Of that kind.

  Raises:
    ValueError: The text is not of that kind, or nothing matches it.
  """

  def __init__(self, vocabulary: _Vocabulary, kind: str, text: str):
    library = _library()
    self.vocabulary = vocabulary
    try:
      grammar = (
        library.LLMatcher.grammar_from_regex(text)
        if kind == 'regex'
        else library.LLMatcher.grammar_from_json_schema(
          text, defaults=dict(whitespace_pattern=_WHITESPACE)
        )
      )
      self.make = functools.partial(
        library.LLMatcher,
        vocabulary.tokens,
        grammar,
        log_level=0,
        limits=library.LLParserLimits(
          max_lexer_states=_MAX_STATES, verbose_errors=False
        ),
      )
      self._source = self.make()
      # Also finds that nothing matches.
      first = vocabulary.mask(self._source)
    except ValueError as e:
      raise ValueError(_refusal(kind, text, e)) from e
    if self._source.is_error():
      error = self._source.get_error().removesuffix('<non-verbose/>').strip()
      if error.startswith('NoExtension'):
        error = 'nothing matches it'
      raise ValueError(_refusal(kind, text, error))
    for i in vocabulary.stop_ids:
      first[i // 32] &= ~np.uint32(1 << i % 32)
    self.is_empty = not first.any()

  def start(self) -> '_Matcher':
    """See `base.Grammar`."""
    return _Matcher(self, self._source)

  def replace(self, source: Any) -> None:
    """Makes a new matcher to copy, if `source` is the one copied now."""
    if self._source is source:
      self._source = self.make()


class _Matcher:
  """A copy of a grammar's matcher.

  Args:
    grammar: What may follow.
    source: The matcher to copy.
  """

  def __init__(self, grammar: _Grammar, source: Any):
    self._grammar = grammar
    self._source = source
    self._matcher = source.deep_copy()
    self._tokens = []

  @property
  def is_done(self) -> bool:
    """See `base.Matcher`."""
    if self._matcher.is_error():
      return False
    # It finds out with the first token that the text has to be empty.
    return self._grammar.is_empty or self._matcher.is_stopped()

  @property
  def error(self) -> str | None:
    """See `base.Matcher`."""
    return self._matcher.get_error() if self._matcher.is_error() else None

  def mask(self) -> np.ndarray:
    """See `base.Matcher`."""
    mask = self._grammar.vocabulary.mask(self._matcher)
    if self._matcher.is_error() and self._source is not None:
      self._restart()
      mask = self._grammar.vocabulary.mask(self._matcher)
    return mask

  def accept(self, token: int) -> bool:
    """See `base.Matcher`."""
    vocabulary = self._grammar.vocabulary
    if self.is_done:
      return token in vocabulary.stop_ids
    # Numbers that are no token would be its end.
    if not 0 <= token < vocabulary.num_tokens:
      return False
    accepted = self._consume(int(token))
    if not accepted and self._source is not None:
      # That the lexer is full is not said before the next mask.
      vocabulary.mask(self._matcher)
      if self._matcher.is_error():
        self._restart()
        accepted = self._consume(int(token))
    if accepted:
      self._tokens.append(int(token))
    return accepted

  def _consume(self, token):
    return self._matcher.try_consume_tokens([token]) == 1

  def _restart(self):
    """Comes back to where it is, with a lexer of its own."""
    self._grammar.replace(self._source)
    self._source = None
    self._matcher = self._grammar.make()
    count = self._matcher.try_consume_tokens(self._tokens)
    if count < len(self._tokens):
      # Its own is full, too. Unlike a trial, this makes it an error.
      self._matcher.consume_token(self._tokens[count])


def _library():
  try:
    import llguidance as library
  except ImportError as e:
    raise ValueError(
      'json_schema and regex need the package llguidance, which is not '
      "installed: pip install 'onemesh[constraints]'"
    ) from e
  return library


def _schema_text(schema):
  # Options are taken with objects alone.
  if isinstance(schema, str):
    return '{}' if schema.strip() == 'true' else schema
  return json.dumps(schema, default=dict, ensure_ascii=False)


def _refusal(kind, text, error):
  shown = text if len(text) <= _SHOWN else text[:_SHOWN] + '...'
  return f'{kind}={shown!r} cannot be compiled: {error}'
