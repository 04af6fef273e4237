"""Repetition, frequency and presence penalties.

* Repetition: Keskar et al., "CTRL: A Conditional Transformer Language Model for
  Controllable Generation", https://arxiv.org/abs/1909.05858, section 4.1, over
  the tokens of prompt and continuation. Negative logits are multiplied where
  the paper divides every logit, which would make these tokens likelier: as
  `RepetitionPenaltyLogitsProcessor` of transformers does.
* Frequency and presence: `mu[j] -= c[j] * frequency + (c[j] > 0) * presence`
  with c counts of the continuation's tokens,
  https://platform.openai.com/docs/api-reference/chat/create.

Letters: U rows, V vocab, S rows of the engine, M longest sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.samplers.base import Rows


def penalize(
  logits: Float[Array, 'U V'],
  rows: Rows,
  on: Bool[Array, 'U'],
  history: Int[Array, 'S M'],
) -> Float[Array, 'U V']:
  """Penalizes the tokens of the rows that are `on`.

  *Cost*: counting scatters M numbers a row, for each of the two kinds of
  penalty that some row uses.
  """
  tokens = history.at[rows.row].get(mode='clip')
  vocab = logits.shape[1]
  index = jnp.arange(history.shape[1])
  is_known = on[:, None] & (index < rows.position[:, None])
  is_generated = is_known & (index >= rows.prompt_len[:, None])

  def repetition(x):
    seen = _counts(tokens, is_known, vocab) > 0
    penalty = rows.repetition_penalty[:, None]
    penalized = jnp.where(x > 0, x / penalty, x * penalty)
    return jnp.where(seen, penalized, x)

  def frequency_and_presence(x):
    counts = _counts(tokens, is_generated, vocab)
    x = x - rows.frequency_penalty[:, None] * counts
    return jnp.where(counts > 0, x - rows.presence_penalty[:, None], x)

  is_counted = (rows.frequency_penalty != 0) | (rows.presence_penalty != 0)
  for used, apply in (
    (rows.repetition_penalty != 1, repetition),
    (is_counted, frequency_and_presence),
  ):
    penalized = jax.lax.cond(jnp.any(on & used), apply, lambda x: x, logits)
    logits = jnp.where((on & used)[:, None], penalized, logits)
  return logits


def _counts(tokens_UM, counted_UM, vocab):
  """How often each token of the vocabulary is counted, `[U, V]` float32."""
  # What is past the end is dropped.
  ids = jnp.where(counted_UM, tokens_UM, vocab)
  zeros = jnp.zeros((len(ids), vocab), jnp.float32)
  row = jnp.arange(len(ids))[:, None]
  return zeros.at[row, ids].add(1.0, mode='drop')
