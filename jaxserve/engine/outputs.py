"""What comes back from an engine."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np


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
class Delta:
  """What a step added to one continuation; `Engine.add_request` takes a sink.

  Attributes:
    request_id: Number of the request.
    index: Which of its `n` continuations.
    text: New text. What may be the start of a stop text is held back.
    token_ids: New tokens.
    logprobs: One per new token, if asked for.
    finish_reason: `None` until the last delta of the continuation.
    output: The whole result, in the last delta of the last continuation.
  """

  request_id: int
  index: int
  text: str
  token_ids: tuple[int, ...]
  logprobs: tuple[TokenLogprob, ...] | None = None
  finish_reason: str | None = None
  output: 'RequestOutput | None' = None


@dataclasses.dataclass(frozen=True)
class Completion:
  """One continuation of a prompt.

  Attributes:
    text: Generated text; '' without a tokenizer.
    token_ids: Generated tokens; a stop token is not among them.
    finish_reason: 'stop' (a stop token or text), 'length', 'abort', or 'error'.
    logprobs: One per token, if asked for.
    error: What went wrong, if `finish_reason` is 'error'.
    taps: Name -> hidden states `[tokens computed, D]`, of those asked for.
  """

  text: str
  token_ids: tuple[int, ...]
  finish_reason: str
  logprobs: tuple[TokenLogprob, ...] | None = None
  error: str | None = None
  taps: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
  """What `LLM.generate` returns for one prompt.

  Attributes:
    request_id: Number of the request in its engine.
    prompt: The prompt's text, if it was one.
    prompt_token_ids: Its tokens.
    outputs: The `n` continuations.
    time_to_first_token_s: Seconds from submission to the first token.
    latency_s: Seconds from submission to the end.
    num_preemptions: How often it was stopped, and swapped or computed again.
    num_cached: Tokens of the prompt that were found in the prefix cache.
    prompt_logprobs: One per token of the prompt but the first, if asked for.
  """

  request_id: int
  prompt: str | None
  prompt_token_ids: tuple[int, ...]
  outputs: tuple[Completion, ...]
  time_to_first_token_s: float
  latency_s: float
  num_preemptions: int
  num_cached: int = 0
  prompt_logprobs: tuple[TokenLogprob, ...] | None = None

  @property
  def text(self) -> str:
    """Text of the first continuation."""
    return self.outputs[0].text


def logprobs_of_row(
  sampled: Any, row: int, token_id: int, num_top: int
) -> TokenLogprob:
  """One row of a step's `runner.Sampled`, with its `num_top` likeliest."""
  ids = sampled.top_ids[row, :num_top].tolist()
  values = sampled.top_logprobs[row, :num_top].tolist()
  return TokenLogprob(
    token_id,
    float(sampled.logprobs[row]),
    tuple(zip(ids, values, strict=True)),
  )
