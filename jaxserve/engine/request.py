"""A live request, on the host."""

from collections.abc import Sequence

from jaxserve.engine.outputs import Completion
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.outputs import TokenLogprob
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.schedulers import base as schedulers
from jaxtrain.checkpoints.tokenizer import IncrementalDecoder
from jaxtrain.checkpoints.tokenizer import Tokenizer


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
