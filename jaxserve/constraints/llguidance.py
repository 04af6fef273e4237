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
syntax of Rust's regex, without looking around.
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
_SHOWN = 200  # Characters of a text that an error message shows.


def llguidance(max_grammars: int = 256) -> Constraint:
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

  Args:
    vocabulary: The tokens.
    kind: 'regex' or 'json_schema'.
    text: Of that kind.

  Raises:
    ValueError: The text is not of that kind, or nothing matches it.
  """

  def __init__(self, vocabulary: _Vocabulary, kind: str, text: str):
    library = _library()
    self._vocabulary = vocabulary
    try:
      grammar = (
        library.LLMatcher.grammar_from_regex(text)
        if kind == 'regex'
        else library.LLMatcher.grammar_from_json_schema(
          text, defaults=dict(whitespace_pattern=_WHITESPACE)
        )
      )
      self._start = library.LLMatcher(
        vocabulary.tokens,
        grammar,
        log_level=0,
        limits=library.LLParserLimits(verbose_errors=False),
      )
      # Also finds that nothing matches, and warms up what copies share.
      first = vocabulary.mask(self._start)
    except ValueError as e:
      raise ValueError(_refusal(kind, text, e)) from e
    if self._start.is_error():
      error = self._start.get_error().removesuffix('<non-verbose/>').strip()
      if error.startswith('NoExtension'):
        error = 'nothing matches it'
      raise ValueError(_refusal(kind, text, error))
    for i in vocabulary.stop_ids:
      first[i // 32] &= ~np.uint32(1 << i % 32)
    self._is_empty = not first.any()

  def start(self) -> '_Matcher':
    """See `base.Grammar`."""
    return _Matcher(
      self._start.deep_copy(), self._vocabulary, is_done=self._is_empty
    )


class _Matcher:
  """One of llguidance's, and what it does not say of itself."""

  def __init__(self, matcher: Any, vocabulary: _Vocabulary, is_done: bool):
    self._matcher = matcher
    self._vocabulary = vocabulary
    # It finds out only with the first token.
    self._is_done = is_done

  @property
  def is_done(self) -> bool:
    """See `base.Matcher`."""
    stopped = self._is_done or self._matcher.is_stopped()
    return stopped and not self._matcher.is_error()

  @property
  def error(self) -> str | None:
    """See `base.Matcher`."""
    return self._matcher.get_error() if self._matcher.is_error() else None

  def mask(self) -> np.ndarray:
    """See `base.Matcher`."""
    return self._vocabulary.mask(self._matcher)

  def accept(self, token: int) -> bool:
    """See `base.Matcher`."""
    if self.is_done:
      return token in self._vocabulary.stop_ids
    # Numbers that are no token would be its end.
    is_token = 0 <= token < self._vocabulary.num_tokens
    return is_token and self._matcher.try_consume_tokens([int(token)]) == 1


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
