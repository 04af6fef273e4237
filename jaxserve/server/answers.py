"""Bodies of answers, in OpenAI's two forms: completions and chat."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import time
from typing import Any
import uuid

from jaxserve.engine.outputs import Completion
from jaxserve.engine.outputs import Delta
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.outputs import TokenLogprob
from jaxtrain.checkpoints.tokenizer import IncrementalDecoder
from jaxtrain.checkpoints.tokenizer import Tokenizer

# JSON has no infinity; OpenAI too writes so of what is impossible.
_IMPOSSIBLE = -9999.0


class TokenTexts:
  """Texts of single tokens, as they stand within a text.

  A token that is none by itself (part of a character, or special) is written
  'token_id:7'.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # SentencePiece drops the space in front of the first token of a text.
    self._before = tokenizer.encode('a')
    self._skip = len(tokenizer.decode(self._before))
    self._known: dict[int, str] = {}

  def __call__(self, token_id: int) -> str:
    if token_id not in self._known:
      text = self._tokenizer.decode([*self._before, token_id])[self._skip :]
      if not text or '\ufffd' in text:
        text = f'token_id:{token_id}'
      self._known[token_id] = text
    return self._known[token_id]


class CompletionAnswer:
  """Answers of `/v1/completions`.

  Args:
    model: Name to answer with.
    tokenizer: Of the model.
    texts: Texts of its tokens.
    values: The request's parameters.
    prompts: Tokens of each prompt.
  """

  kind = chunk_kind = 'text_completion'
  _prefix = 'cmpl-'

  def __init__(
    self,
    model: str,
    tokenizer: Tokenizer,
    texts: TokenTexts,
    values: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
  ):
    self.id = f'{self._prefix}{uuid.uuid4().hex}'
    self._model = model
    self._created = int(time.time())
    self._tokenizer = tokenizer
    self._texts = texts
    self._values = values
    self._prompts = prompts
    self._offsets: dict[int, _Offsets] = {}

  def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The answer that is not streamed; one output per prompt."""
    choices = [
      self._choice(i * len(out.outputs) + j, out, c)
      for i, out in enumerate(outputs)
      for j, c in enumerate(out.outputs)
    ]
    return self._body(self.kind, choices) | {'usage': self.usage(outputs)}

  def first_chunks(self) -> list[dict[str, Any]]:
    """What a stream starts with."""
    if not self._values['echo']:
      return []
    chunks = []
    for i, prompt in enumerate(self._prompts):
      text = self._tokenizer.decode(prompt)
      for j in range(self._values['n']):
        index = i * self._values['n'] + j
        choice = self._piece(index, text, None, None, list(prompt))
        chunks.append(self._body(self.chunk_kind, [choice]))
    return chunks

  def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
    """The piece of a stream for a delta; `None` if it says nothing."""
    if not (
      delta.text
      or delta.logprobs
      or delta.finish_reason
      or self._values['return_token_ids']
    ):
      return None
    if self._values['max_tokens'] == 0:
      delta = dataclasses.replace(delta, text='', token_ids=(), logprobs=None)
    logprobs = None
    if delta.logprobs is not None:
      logprobs = self._logprobs(index, delta.logprobs)
    choice = self._piece(
      index, delta.text, logprobs, delta.finish_reason, list(delta.token_ids)
    )
    return self._body(self.chunk_kind, [choice])

  def last_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The piece that holds the usage."""
    return self._body(self.chunk_kind, []) | {'usage': self.usage(outputs)}

  def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens read and generated."""
    prompt = sum(len(out.prompt_token_ids) for out in outputs)
    generated = sum(len(c.token_ids) for out in outputs for c in out.outputs)
    if self._values.get('max_tokens') == 0:
      generated = 0
    return {
      'prompt_tokens': prompt,
      'completion_tokens': generated,
      'total_tokens': prompt + generated,
      'prompt_tokens_details': {
        'cached_tokens': sum(out.num_cached for out in outputs)
      },
    }

  def _body(self, kind, choices):
    body = {
      'id': self.id,
      'object': kind,
      'created': self._created,
      'model': self._model,
      'choices': choices,
    }
    if (self._values['stream_options'] or {}).get('include_usage'):
      body['usage'] = None
    return body

  def _choice(self, index, out: RequestOutput, c: Completion):
    text, tokens, logprobs = c.text, list(c.token_ids), c.logprobs
    if self._values['max_tokens'] == 0:
      text, tokens, logprobs = '', [], logprobs and ()
    if self._values['echo']:
      text = self._tokenizer.decode(out.prompt_token_ids) + text
      tokens = [*out.prompt_token_ids, *tokens]
      if logprobs is not None:
        first = TokenLogprob(tokens[0], math.nan, ())
        logprobs = (first, *(out.prompt_logprobs or ()), *logprobs)
    if logprobs is not None:
      logprobs = self._logprobs(index, logprobs)
    return self._piece(index, text, logprobs, c.finish_reason, tokens)

  def _piece(self, index, text, logprobs, finish_reason, tokens):
    choice = {
      'index': index,
      'text': text,
      'logprobs': logprobs,
      'finish_reason': finish_reason,
    }
    if self._values['return_token_ids']:
      choice['token_ids'] = tokens
    return choice

  def _logprobs(self, index, entries):
    offsets = self._offsets.setdefault(index, _Offsets(self._tokenizer))
    tops = []
    for e in entries:
      # The token itself is always among them.
      top = {self._texts(e.token_id): _finite(e.logprob)}
      top |= {self._texts(i): _finite(p) for i, p in e.top}
      # Of the first token of all, nothing is known.
      tops.append(None if math.isnan(e.logprob) else top)
    return {
      'tokens': [self._texts(e.token_id) for e in entries],
      'token_logprobs': [_finite(e.logprob) for e in entries],
      'top_logprobs': tops,
      'text_offset': [offsets.push(e.token_id) for e in entries],
    }


class ChatAnswer(CompletionAnswer):
  """Answers of `/v1/chat/completions`."""

  kind = 'chat.completion'
  chunk_kind = 'chat.completion.chunk'
  _prefix = 'chatcmpl-'

  def first_chunks(self) -> list[dict[str, Any]]:
    """Says whose the message is."""
    return [
      self._body(
        self.chunk_kind,
        [_delta(i, {'role': 'assistant', 'content': ''}, None, None)],
      )
      for i in range(self._values['n'])
    ]

  def _choice(self, index, out, c):
    choice = {
      'index': index,
      'message': {'role': 'assistant', 'content': c.text, 'refusal': None},
      'logprobs': None,
      'finish_reason': c.finish_reason,
    }
    if c.logprobs is not None:
      choice['logprobs'] = self._logprobs(index, c.logprobs)
    if self._values['return_token_ids']:
      choice['token_ids'] = list(c.token_ids)
    return choice

  def _piece(self, index, text, logprobs, finish_reason, tokens):
    delta = {'content': text} if text or not finish_reason else {}
    choice = _delta(index, delta, logprobs, finish_reason)
    if self._values['return_token_ids']:
      choice['token_ids'] = tokens
    return choice

  def _logprobs(self, index, entries):
    return {
      'content': [
        self._entry(e.token_id, e.logprob)
        | {'top_logprobs': [self._entry(*item) for item in e.top]}
        for e in entries
      ],
      'refusal': None,
    }

  def _entry(self, token_id, logprob):
    text = self._texts(token_id)
    is_text = not text.startswith('token_id:')
    return {
      'token': text,
      'logprob': _finite(logprob),
      'bytes': list(text.encode('utf-8', 'replace')) if is_text else None,
    }


class _Offsets:
  """Where in its text each token starts, in characters."""

  def __init__(self, tokenizer):
    self._decoder = IncrementalDecoder(tokenizer)
    self._length = 0

  def push(self, token_id):
    start = self._length
    self._length += len(self._decoder.push(token_id))
    return start


def _delta(index, delta, logprobs, finish_reason):
  return {
    'index': index,
    'delta': delta,
    'logprobs': logprobs,
    'finish_reason': finish_reason,
  }


def _finite(logprob):
  return None if math.isnan(logprob) else max(logprob, _IMPOSSIBLE)
