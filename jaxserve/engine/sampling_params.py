"""How a prompt is continued: everything a request may ask for."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import types
from typing import Any


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
      likeliest ones; `None` returns none.
    processed_logprobs: Log-probabilities of the distribution the token was
      drawn from (penalties, bias, masks, temperature and cuts applied) in place
      of the model's own.
    prompt_logprobs: The same of the prompt's tokens, from the second on.
    n: Continuations of the prompt, which they share in the cache. The seed of
      continuation i is a function of `seed` and i; that of the first is `seed`.
    presence_penalty: Subtracted from the logits of tokens already generated.
    frequency_penalty: The same, times how often.
    repetition_penalty: Divides positive logits, and multiplies negative ones,
      of the tokens of prompt and continuation (Keskar et al.,
      https://arxiv.org/abs/1909.05858, section 4.1); 1 does nothing.
    logit_bias: Token id -> value added to its logit.
    allowed_token_ids: Only these can be drawn; `None` allows all.
    bad_token_ids: These cannot be drawn.
    min_tokens: No stop token can be drawn before this many.
    json_schema: The text is JSON of this schema (a mapping, or its text).
    regex: The text matches this regular expression.
    taps: Names, among `EngineConfig.taps`, of hidden states to return.
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
  processed_logprobs: bool = False
  prompt_logprobs: int | None = None
  n: int = 1
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  repetition_penalty: float = 1.0
  logit_bias: Mapping[int, float] = dataclasses.field(
    default_factory=lambda: types.MappingProxyType({})
  )
  allowed_token_ids: Sequence[int] | None = None
  bad_token_ids: Sequence[int] = ()
  min_tokens: int = 0
  json_schema: str | Mapping[str, Any] | None = None
  regex: str | None = None
  taps: Sequence[str] = ()

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
    for name in ('logprobs', 'prompt_logprobs'):
      value = getattr(self, name)
      check(name, value is None or value >= 0, 'at least 0, or None')
    check('n', self.n >= 1, 'at least 1')
    for name in ('presence_penalty', 'frequency_penalty'):
      check(name, -2 <= getattr(self, name) <= 2, 'in [-2, 2]')
    check(
      'repetition_penalty',
      math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
      'finite and positive',
    )
    check(
      'logit_bias',
      all(math.isfinite(v) for v in self.logit_bias.values()),
      'finite values',
    )
    check(
      'allowed_token_ids',
      self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
      'not empty, or None',
    )
    check(
      'min_tokens',
      0 <= self.min_tokens <= (self.max_tokens or math.inf),
      f'at least 0 and at most max_tokens={self.max_tokens}',
    )
    if self.json_schema is not None and self.regex is not None:
      raise ValueError('json_schema and regex cannot both be given')
