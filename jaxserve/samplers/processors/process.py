"""Masks, biases and penalties, for the rows of a mixed batch that use them.

In this order, which is that of vLLM (`vllm/v1/sample/sampler.py`) and, for what
does not commute, of transformers (`_get_logits_processor`: bias, penalties):

1. tokens that the row may not draw (a list, or a grammar): minus infinity;
2. stop tokens before the minimum length: minus infinity;
3. logit bias: added, more than once for a token that is listed more than once;
4. repetition penalty (Keskar et al., https://arxiv.org/abs/1909.05858), of the
   biased logits;
5. frequency, then presence penalty.

Temperature and cuts follow, in the sampler. Nothing finite brings a masked
token back, so 1 and 2 could as well come last.

Letters: U rows, V vocab, W = ceil(V / 32) words of a mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxserve.samplers.base import Rows
from jaxserve.samplers.base import RowState
from jaxserve.samplers.processors.masks import unpack
from jaxserve.samplers.processors.penalties import penalize

_PENALTIES, _BIAS, _MASK, _MIN_TOKENS = 1, 2, 4, 8


def process(
  logits: Float[Array, 'U V'], rows: Rows, state: RowState
) -> Float[Array, 'U V']:
  """Applies to each row what it asks for, and leaves the others' bits alone.

  What no row asks for is not computed. A row's result depends on no other row.

  Args:
    logits: float32.
    rows: What each row asks for; rows whose bit of `features` is clear may
      have anything in `state`.
    state: Of all rows of the engine.

  Returns:
    The logits to draw from. Masks may leave nothing: minus infinity everywhere,
    of which no sampler makes sense; see `can_draw`.
  """
  uses = lambda bit: (rows.features & bit) != 0
  for on, apply in (
    (uses(_MASK), lambda x, on: _mask(x, on, rows, state)),
    (
      uses(_MIN_TOKENS) & (rows.position < rows.min_position),
      lambda x, on: _mask_stops(x, on, rows, state),
    ),
    (uses(_BIAS), lambda x, on: _add_bias(x, on, rows, state)),
    (uses(_PENALTIES), lambda x, on: penalize(x, rows, on, state.history)),
  ):
    logits = jax.lax.cond(jnp.any(on), apply, lambda x, _: x, logits, on)
  return logits


def can_draw(logits: Float[Array, 'U V']) -> Bool[Array, 'U']:
  """Whether a row has a distribution to draw from.

  False where a logit is NaN or plus infinity, and where masks have left no
  token: all are minus infinity. What a sampler draws of such a row is not to be
  trusted.
  """
  # A maximum is NaN if anything is.
  return jnp.isfinite(jnp.max(logits, axis=-1))


def _mask(logits_UV, on, rows, state):
  words = state.mask.at[rows.row].get(mode='clip')
  allowed = unpack(words, logits_UV.shape[1])
  return jnp.where(on[:, None] & ~allowed, -jnp.inf, logits_UV)


def _mask_stops(logits_UV, on, rows, state):
  ids = state.stop_ids.at[rows.row].get(mode='clip')
  at = _places(ids, on, logits_UV.shape[1])
  return logits_UV.at[at].set(-jnp.inf, mode='drop')


def _add_bias(logits_UV, on, rows, state):
  ids = state.bias_ids.at[rows.row].get(mode='clip')
  bias = state.bias.at[rows.row].get(mode='clip')
  at = _places(ids, on, logits_UV.shape[1])
  return logits_UV.at[at].add(bias, mode='drop')


def _places(ids, on, vocab):
  """Indices of the logits that `ids` name; out of bounds if they name none."""
  # Negative indices would count from the end.
  ids = jnp.where(on[:, None] & (ids >= 0), ids, vocab)
  return jnp.arange(len(ids))[:, None], ids
