"""What an engine accepts, and what it makes of it."""

from collections.abc import Callable, Sequence
import contextlib
import time

from jaxserve import constraints
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.features import features_of
from jaxserve.engine.request import Continuation
from jaxserve.engine.request import Request
from jaxserve.engine.request import Sink
from jaxserve.engine.request import seed_of
from jaxserve.engine.sampling_params import SamplingParams
from jaxtrain.checkpoints.tokenizer import Tokenizer


class Admission:
  """Turns prompts into requests, or says what is wrong with them.

  Args:
    config: Sizes of the engine.
    max_seq_len: Longest request, in tokens.
    num_pages: Pages of the pool.
    num_logprobs: Log-probabilities a row can return.
    max_stop_ids: Stop tokens that the device can forbid.
    vocab_size: Token ids are below it.
    tokenizer: For text; `None` works on token ids only.
  """

  def __init__(
    self,
    config: EngineConfig,
    *,
    max_seq_len: int,
    num_pages: int,
    num_logprobs: int,
    max_stop_ids: int,
    vocab_size: int,
    tokenizer: Tokenizer | None,
  ):
    self._config = config
    self._max_seq_len = max_seq_len
    self._num_pages = num_pages
    self._num_logprobs = num_logprobs
    self._max_stop_ids = max_stop_ids
    self._vocab_size = vocab_size
    self._tokenizer = tokenizer
    self._constraint = constraints.get(config.constraints)()

  def request(
    self,
    prompt: str | Sequence[int],
    params: SamplingParams,
    request_id: int,
    priority: int,
    client: str,
    sink: Sink | None,
  ) -> Request:
    """A request that the engine can answer.

    Raises:
      ValueError: It cannot; what is wrong is named.
    """
    ids = self._encode(prompt)
    self._check(params, len(ids))
    return Request(
      request_id,
      prompt if isinstance(prompt, str) else None,
      tuple(ids),
      params,
      priority,
      client,
      time.perf_counter(),
      sink,
    )

  def continuations(
    self, request: Request, first_uid: int, make_keys: Callable
  ) -> list[Continuation]:
    """The `n` continuations, entered in the request."""
    params = request.params
    stop_ids = set(params.stop_token_ids)
    if self._tokenizer is not None and not params.ignore_eos:
      stop_ids |= set(self._tokenizer.stop_ids)
    # Consecutive numbers of one engine seed give unrelated 32-bit seeds.
    own = self._config.seed * 0x9E3779B1 + request.id * 0x85EBCA6B
    seed = own if params.seed is None else params.seed
    grammar = self._grammar(params)
    features = features_of(
      params, sorted(stop_ids), self._vocab_size, grammar is not None
    )
    if len(features.stop_ids) > self._max_stop_ids:
      raise ValueError(
        f'min_tokens with {len(features.stop_ids)} stop tokens; at most '
        f'{self._max_stop_ids} are possible'
      )
    for index in range(params.n):
      request.continuations.append(
        Continuation(
          first_uid + index,
          index,
          request,
          make_keys(request.prompt_ids),
          max_tokens=self._max_tokens(len(request.prompt_ids), params),
          seed=seed_of(seed, index),
          stop_ids=frozenset(stop_ids),
          features=features,
          tokenizer=self._tokenizer,
          matcher=None if grammar is None else grammar.start(),
        )
      )
    return request.continuations

  def prepare_grammars(self) -> None:
    """Reads the vocabulary as grammars need it: seconds, if it is large.

    Else the first request with a grammar does. Nothing is said where grammars
    are not possible.
    """
    if self._tokenizer is not None:
      with contextlib.suppress(ValueError):
        self._constraint.compile(self._tokenizer, self._vocab_size, regex='a')

  def _grammar(self, params):
    if params.json_schema is None and params.regex is None:
      return None
    if self._tokenizer is None:
      raise ValueError('json_schema and regex need a tokenizer')
    return self._constraint.compile(
      self._tokenizer,
      self._vocab_size,
      json_schema=params.json_schema,
      regex=params.regex,
    )

  def _encode(self, prompt):
    if isinstance(prompt, str):
      if self._tokenizer is None:
        raise ValueError(
          'a text prompt needs a tokenizer; give token ids or '
          'LLM(tokenizer=...)'
        )
      ids = self._tokenizer.encode(prompt, add_bos=True) if prompt else []
    else:
      ids = [int(t) for t in prompt]
    if not ids:
      raise ValueError('the prompt is empty')
    self._check_ids(ids, 'token ids')
    return ids

  def _check_ids(self, ids, name):
    bad = [t for t in ids if not 0 <= t < self._vocab_size]
    if bad:
      raise ValueError(f'{name} {bad[:8]} are not in 0..{self._vocab_size - 1}')

  def _check(self, params, prompt_len):
    for name in ('logprobs', 'prompt_logprobs'):
      if (getattr(params, name) or 0) > self._num_logprobs:
        raise ValueError(
          f'{name}={getattr(params, name)} is above '
          f'max_logprobs={self._num_logprobs} of the engine'
        )
    if len(params.logit_bias) > self._config.max_logit_bias:
      raise ValueError(
        f'logit_bias of {len(params.logit_bias)} tokens is above '
        f'max_logit_bias={self._config.max_logit_bias} of the engine'
      )
    for name in (
      'logit_bias',
      'allowed_token_ids',
      'bad_token_ids',
      'stop_token_ids',
    ):
      self._check_ids(getattr(params, name) or (), name)
    unknown = [name for name in params.taps if name not in self._config.taps]
    if unknown:
      raise ValueError(
        f'taps {unknown} are not among the taps of the engine, '
        f'{list(self._config.taps)}'
      )
    if params.stop and self._tokenizer is None:
      raise ValueError('stop texts need a tokenizer')
    self._max_tokens(prompt_len, params)

  def _max_tokens(self, prompt_len, params):
    room = self._max_seq_len - prompt_len
    if room < 1:
      raise ValueError(
        f'the prompt has {prompt_len} tokens, but a sequence has at most '
        f'{self._max_seq_len}, the generated ones included'
      )
    wanted = room if params.max_tokens is None else min(params.max_tokens, room)
    # The last token is returned and never computed: it needs no slot.
    pages = -(-(prompt_len + wanted - 1) // self._config.page_size)
    if pages > self._num_pages:
      raise ValueError(
        f'it can never fit: {prompt_len} prompt and {wanted} new tokens need '
        f'{pages} pages of {self._config.page_size}, and the pool has '
        f'{self._num_pages}'
      )
    return wanted
