"""What a request asks of sampling beyond temperature and cuts.

Each is a bit; a row whose bit is clear ignores what the device has of it.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxserve.engine.sampling_params import SamplingParams

PENALTIES, BIAS, MASK, MIN_TOKENS = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Features:
  """What the device must know of a row, once, when it is entered.

  Attributes:
    bits: Which features are used.
    bias: Token id -> value added to its logit.
    stop_ids: Tokens that cannot be drawn before `min_tokens`.
    mask: Bit v % 32 of word v // 32 is set if token v can be drawn.
  """

  bits: int
  bias: dict[int, float]
  stop_ids: tuple[int, ...]
  mask: np.ndarray | None


def features_of(
  params: SamplingParams,
  stop_ids: Sequence[int],
  vocab_size: int,
  has_grammar: bool,
) -> Features:
  """The features that a request uses."""
  mask = None
  if params.allowed_token_ids is not None or params.bad_token_ids:
    mask = _mask(params.allowed_token_ids, params.bad_token_ids, vocab_size)
  penalties = (params.presence_penalty, params.frequency_penalty)
  bits = (
    PENALTIES * (any(penalties) or params.repetition_penalty != 1)
    + BIAS * bool(params.logit_bias)
    + MASK * (mask is not None or has_grammar)
    + MIN_TOKENS * bool(params.min_tokens and stop_ids)
  )
  used = tuple(stop_ids) if bits & MIN_TOKENS else ()
  return Features(bits, dict(params.logit_bias), used, mask)


def _mask(allowed, bad, vocab_size):
  can_draw = np.full(-(-vocab_size // 32) * 32, allowed is None)
  if allowed is not None:
    can_draw[list(allowed)] = True
  can_draw[list(bad)] = False
  can_draw[vocab_size:] = False
  return np.packbits(can_draw, bitorder='little').view(np.uint32)
