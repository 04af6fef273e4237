"""Requests: what a user asks, what the engine keeps, what comes back."""

from collections.abc import Sequence
import dataclasses
import math

from jaxserve.schedulers import base as schedulers
from jaxtrain.checkpoints.tokenizer import IncrementalDecoder
from jaxtrain.checkpoints.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How to continue a prompt.

  Attributes:
    max_tokens: Tokens to generate at most; `None` goes on to the context
      length.
    temperature: Divides the logits; 0 is greedy.
    top_k: Keep the k most likely tokens; 0 keeps all.
    top_p: Keep the smallest set of likely tokens with this much probability.
    min_p: Keep tokens at least this likely relative to the most likely one.
    seed: The same seed gives the same tokens, whatever shares the batch; `None`
      is a seed of the engine's own.
    stop: Texts that end the generation; not part of the result.
    stop_token_ids: Tokens that end it, besides the tokenizer's; not part of
      the result.
    ignore_eos: Go on past the tokenizer's own stop tokens.
    logprobs: Return the log-probability of each token, and of this many
      likeliest ones, before temperature and cuts; `None` returns none.
  """

  max_tokens: int | None = 64
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int | None = None
  stop: Sequence[str] = ()
  stop_token_ids: Sequence[int] = ()
  ignore_eos: bool = False
  logprobs: int | None = None

  def __post_init__(self):
    if isinstance(self.stop, str):
      object.__setattr__(self, 'stop', (self.stop,))

    def check(name, ok, allowed):
      if not ok:
        raise ValueError(f'{name}={getattr(self, name)!r} must be {allowed}')

    check(
      'max_tokens',
      self.max_tokens is None or self.max_tokens >= 1,
      'at least 1, or None',
    )
    check(
      'temperature',
      math.isfinite(self.temperature) and self.temperature >= 0,
      'finite and not negative',
    )
    check('top_k', self.top_k >= 0, 'at least 0 (0 keeps all)')
    check('top_p', 0 < self.top_p <= 1, 'in (0, 1]')
    check('min_p', 0 <= self.min_p <= 1, 'in [0, 1]')
    check('stop', all(self.stop), 'non-empty texts')
    check('logprobs', self.logprobs is None or self.logprobs >= 0, 'at least 0')


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """Log-probability of a generated token, in nats.

  Attributes:
    token_id: The token.
    logprob: Its log-probability.
    top: `(token id, log-probability)` of the likeliest tokens, best first.
  """

  token_id: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Completion:
  """One continuation of a prompt.

  Attributes:
    text: Generated text; '' without a tokenizer.
    token_ids: Generated tokens; a stop token is not among them.
    finish_reason: 'stop' (a stop token or text), 'length', or 'abort'.
    logprobs: One per token, if asked for.
  """

  text: str
  token_ids: tuple[int, ...]
  finish_reason: str
  logprobs: tuple[TokenLogprob, ...] | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
  """What `LLM.generate` returns for one prompt.

  Attributes:
    request_id: Number of the request in its engine.
    prompt: The prompt's text, if it was one.
    prompt_token_ids: Its tokens.
    outputs: The continuations; one for now.
    time_to_first_token_s: Seconds from submission to the first token.
    latency_s: Seconds from submission to the end.
    num_preemptions: How often it was stopped and computed again.
  """

  request_id: int
  prompt: str | None
  prompt_token_ids: tuple[int, ...]
  outputs: tuple[Completion, ...]
  time_to_first_token_s: float
  latency_s: float
  num_preemptions: int

  @property
  def text(self) -> str:
    """Text of the first continuation."""
    return self.outputs[0].text


class Request:
  """A live request, on the host.

  `tokens` are the known ones; `num_pending` more (0 or 1) have been sampled on
  the device and not been read yet.
  """

  def __init__(
    self,
    request_id: int,
    prompt: str | None,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    max_tokens: int,
    seed: int,
    stop_ids: frozenset[int],
    tokenizer: Tokenizer | None,
    submitted_s: float,
  ):
    self.id = request_id
    self.prompt = prompt
    self.params = params
    self.max_tokens = max_tokens
    self.seed = seed
    self.stop_ids = stop_ids
    self.prompt_len = len(prompt_ids)
    self.tokens = list(prompt_ids)
    self.num_pending = 0
    self.num_computed = 0
    self.num_preemptions = 0
    self.pages: list[int] = []
    self.row: int | None = None
    self.finish_reason: str | None = None
    self.text = ''
    self.logprobs: list[TokenLogprob] = []
    self.submitted_s = submitted_s
    self.first_token_s: float | None = None
    self._decoder = IncrementalDecoder(tokenizer) if tokenizer else None

  @property
  def num_generated(self) -> int:
    """Generated tokens, pending ones included."""
    return len(self.tokens) + self.num_pending - self.prompt_len

  @property
  def wants_more(self) -> bool:
    """Whether another token may be sampled."""
    return self.finish_reason is None and self.num_generated < self.max_tokens

  def view(self) -> schedulers.Request:
    """What a scheduler may see."""
    return schedulers.Request(
      id=self.id,
      arrival=self.id,
      num_tokens=len(self.tokens) + self.num_pending,
      num_computed=self.num_computed,
      num_pages=len(self.pages),
      is_running=self.row is not None,
    )

  def append(self, token: int, logprob: TokenLogprob | None) -> None:
    """Takes a sampled token, and ends the request if it is the last."""
    if token in self.stop_ids:
      self.finish('stop')
      return
    self.tokens.append(token)
    if logprob is not None:
      self.logprobs.append(logprob)
    if self._decoder is not None:
      self.text += self._decoder.push(token)
      if self.params.stop and self._cut_at_stop():
        return
    if len(self.tokens) - self.prompt_len >= self.max_tokens:
      self.finish('length')

  def finish(self, reason: str) -> None:
    """Ends the request; held-back text is released and searched for stops."""
    self.finish_reason = reason
    if self._decoder is not None:
      self.text += self._decoder.flush()
      if self.params.stop:
        self._cut_at_stop()

  def output(self, now_s: float) -> RequestOutput:
    """The result, once finished."""
    completion = Completion(
      text=self.text,
      token_ids=tuple(self.tokens[self.prompt_len :]),
      finish_reason=self.finish_reason,
      logprobs=(None if self.params.logprobs is None else tuple(self.logprobs)),
    )
    first_s = now_s if self.first_token_s is None else self.first_token_s
    return RequestOutput(
      request_id=self.id,
      prompt=self.prompt,
      prompt_token_ids=tuple(self.tokens[: self.prompt_len]),
      outputs=(completion,),
      time_to_first_token_s=first_s - self.submitted_s,
      latency_s=now_s - self.submitted_s,
      num_preemptions=self.num_preemptions,
    )

  def _cut_at_stop(self):
    found = [i for s in self.params.stop if (i := self.text.find(s)) >= 0]
    if found:
      self.text = self.text[: min(found)]
      self.finish_reason = 'stop'
    return bool(found)
