"""A live request on the host, and its continuations.

A request asks for `n` continuations of one prompt. To a scheduler each of them
is a request of its own.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from jaxserve.cache.keys import Keys
from jaxserve.constraints.base import Matcher
from jaxserve.engine.features import Features
from jaxserve.engine.outputs import Completion
from jaxserve.engine.outputs import Delta
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.outputs import TokenLogprob
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.schedulers import base as schedulers
from jaxtrain.checkpoints.tokenizer import IncrementalDecoder
from jaxtrain.checkpoints.tokenizer import Tokenizer

Sink = Callable[[Delta], None]
# The error of a request whose grammar and allowed tokens exclude each other.
NO_TOKEN = 'no token is allowed to come next'


@dataclasses.dataclass
class Request:
  """What was asked, and the continuations that answer it.

  Attributes:
    id: Number the caller knows it by.
    prompt: The prompt's text, if it was one.
    prompt_ids: Its tokens.
    params: How to continue it.
    priority: Larger runs earlier.
    client: Whose it is.
    submitted_s: When it came.
    sink: Takes what each step adds, or `None`.
    continuations: The `params.n` of them.
    first_token_s: When the first token was known.
    prompt_logprobs: Of the prompt's tokens from the second on.
  """

  id: int
  prompt: str | None
  prompt_ids: tuple[int, ...]
  params: SamplingParams
  priority: int
  client: str
  submitted_s: float
  sink: Sink | None
  continuations: list['Continuation'] = dataclasses.field(default_factory=list)
  first_token_s: float | None = None
  prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

  @property
  def is_finished(self) -> bool:
    return all(c.finish_reason is not None for c in self.continuations)

  def output(self, now_s: float) -> RequestOutput:
    """The result, once finished."""
    first_s = now_s if self.first_token_s is None else self.first_token_s
    wants_prompt = self.params.prompt_logprobs is not None
    return RequestOutput(
      request_id=self.id,
      prompt=self.prompt,
      prompt_token_ids=self.prompt_ids,
      outputs=tuple(c.completion() for c in self.continuations),
      time_to_first_token_s=first_s - self.submitted_s,
      latency_s=now_s - self.submitted_s,
      num_preemptions=sum(c.num_preemptions for c in self.continuations),
      num_cached=self.continuations[0].num_cached,
      prompt_logprobs=tuple(self.prompt_logprobs) if wants_prompt else None,
    )


class Continuation:
  """One continuation: its tokens, its place in the cache, its text.

  `tokens` are the known ones; `num_pending` more have been sampled on the
  device and not been read yet.
  """

  def __init__(
    self,
    uid: int,
    index: int,
    request: Request,
    keys: Keys | None,
    *,
    max_tokens: int,
    seed: int,
    stop_ids: frozenset[int],
    features: Features,
    tokenizer: Tokenizer | None,
    matcher: Matcher | None,
  ):
    self.id = uid
    self.index = index
    self.request = request
    self.params = request.params
    self.keys = keys
    self.max_tokens = max_tokens
    self.seed = seed
    self.stop_ids = stop_ids
    self.features = features
    self.matcher = matcher
    self.prompt_len = len(request.prompt_ids)
    self.tokens = list(request.prompt_ids)
    self.num_pending = 0
    self.num_computed = 0
    self.num_cached = 0
    self.num_published = 0  # Whole pages the prefix cache knows of.
    # Prompt tokens, but the first, whose log-probability is asked for.
    self.num_looked_up = 0
    self.num_preemptions = 0
    self.is_swapped = False
    self.pages: list[int] = []
    self.row: int | None = None
    self.finish_reason: str | None = None
    self.error: str | None = None
    self.text = ''
    self.logprobs: list[TokenLogprob] = []
    self.taps: list[np.ndarray] = []
    self.is_sent = False  # Its end has reached the sink.
    self._sent_text = 0
    self._sent_tokens = 0
    self._decoder = IncrementalDecoder(tokenizer) if tokenizer else None

  @property
  def num_tokens(self) -> int:
    """Known and pending tokens."""
    return len(self.tokens) + self.num_pending

  @property
  def num_generated(self) -> int:
    """Generated tokens, pending ones included."""
    return self.num_tokens - self.prompt_len

  @property
  def is_live(self) -> bool:
    """Whether a step may run it: another token may be sampled, and can be.

    A grammar must see a token before the next one can be drawn, and later
    continuations wait for the first one's prompt.
    """
    if self.finish_reason is not None or self.num_generated >= self.max_tokens:
      return False
    if self.matcher is not None and self.num_pending:
      return False
    leader = self.request.continuations[0]
    return (
      self is leader
      or self.row is not None
      or leader.num_computed >= self.prompt_len
      or leader.finish_reason is not None
    )

  def view(self) -> schedulers.Request:
    """What a scheduler may see."""
    request = self.request
    return schedulers.Request(
      id=self.id,
      arrival=self.id,
      num_tokens=len(self.tokens) + self.num_pending,
      num_computed=self.num_computed,
      num_pages=len(self.pages),
      is_running=self.row is not None,
      prompt=request.prompt_ids,
      max_tokens=self.max_tokens,
      priority=request.priority,
      client=request.client,
      arrival_s=request.submitted_s,
    )

  def append(self, token: int, logprob: TokenLogprob | None) -> None:
    """Takes a sampled token, and ends the continuation if it is the last."""
    if token in self.stop_ids:
      self.finish('stop')
      return
    if self.matcher is not None and not self.matcher.accept(token):
      self.fail(f'token {token} is not what the grammar allows')
      return
    self.tokens.append(token)
    if logprob is not None:
      self.logprobs.append(logprob)
    if self._decoder is not None:
      self._extend_text(self._decoder.push(token))
      if self.finish_reason is not None:
        return
    if self.matcher is not None and self.matcher.is_done:
      self.finish('stop')
    elif len(self.tokens) - self.prompt_len >= self.max_tokens:
      self.finish('length')

  def finish(self, reason: str) -> None:
    """Ends it; held-back text is released and searched for stops."""
    self.finish_reason = reason
    if self._decoder is not None:
      self._extend_text(self._decoder.flush())

  def fail(self, error: str) -> None:
    """Ends it for a reason that is nobody's choice."""
    self.finish_reason, self.error = 'error', error

  def completion(self) -> Completion:
    """What it has so far."""
    taps = None
    if self.params.taps:
      states = np.concatenate(self.taps, axis=1) if self.taps else ()
      taps = dict(zip(self.params.taps, states, strict=bool(self.taps)))
    return Completion(
      text=self.text,
      token_ids=tuple(self.tokens[self.prompt_len :]),
      finish_reason=self.finish_reason,
      logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
      error=self.error,
      taps=taps,
    )

  def send(self, now_s: float) -> None:
    """Gives the sink what is new, if anything is; its end only once."""
    sink = self.request.sink
    if sink is None or self.is_sent:
      return
    end = len(self.text)
    if self.finish_reason is None:
      end -= self._num_held_back()
    first = self.prompt_len + self._sent_tokens
    tokens = tuple(self.tokens[first:])
    if not tokens and end <= self._sent_text and self.finish_reason is None:
      return
    logprobs = None
    if self.params.logprobs is not None:
      logprobs = tuple(self.logprobs[self._sent_tokens :])
    request = self.request
    # Several may end in one step: the output goes with the last to be sent.
    self.is_sent = self.finish_reason is not None
    is_last = all(c.is_sent for c in request.continuations)
    delta = Delta(
      request.id,
      self.index,
      self.text[self._sent_text : end],
      tokens,
      logprobs,
      self.finish_reason,
      request.output(now_s) if is_last else None,
    )
    self._sent_text = max(end, self._sent_text)
    self._sent_tokens += len(tokens)
    sink(delta)

  def _extend_text(self, new: str):
    known = len(self.text)
    self.text += new
    found = []
    for stop in self.params.stop:
      at = self.text.find(stop, max(0, known - len(stop) + 1))
      if at >= 0:
        found.append(at)
    if found:
      self.text = self.text[: min(found)]
      self.finish_reason = 'stop'

  def _num_held_back(self):
    """Characters at the end that may be the start of a stop text."""
    return max(
      (
        k
        for stop in self.params.stop
        for k in range(1, min(len(stop), len(self.text) + 1))
        if self.text.endswith(stop[:k])
      ),
      default=0,
    )


def seed_of(seed: int, index: int) -> int:
  """32-bit seed of continuation `index`; that of the first is `seed`."""
  return (seed + index * 0x9E3779B1) & 0xFFFFFFFF
