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
  """Penalizes the tokens of the rows that are `on`: repetition comes first.

  *Cost*: sorts M numbers a row, and changes as many logits in place; nothing is
  as large as the logits.
  """
  vocab = logits.shape[1]
  tokens = history.at[rows.row].get(mode='clip')
  index = jnp.arange(tokens.shape[1])
  is_known = on[:, None] & (index < rows.position[:, None])
  is_known &= (tokens >= 0) & (tokens < vocab)
  is_generated = is_known & (index >= rows.prompt_len[:, None])
  ids, counts, is_last = _runs(jnp.where(is_known, tokens, vocab), is_generated)

  column = lambda x: x[:, None]
  row = column(jnp.arange(len(ids)))
  x = logits.at[row, ids].get(mode='clip')
  penalty = column(rows.repetition_penalty)
  x = jnp.where(x > 0, x / penalty, x * penalty)
  x -= column(rows.frequency_penalty) * counts
  x -= jnp.where(counts > 0, column(rows.presence_penalty), 0)
  # Once for each token; the rest is past the end, and dropped.
  at = jnp.where(is_last & (ids < vocab), ids, vocab + index)
  return logits.at[row, at].set(x, mode='drop', unique_indices=True)


def _runs(tokens_UM, counted_UM):
  """Sorts tokens into runs of equal ones.

  Returns:
    The tokens, how many counted ones of its run each has up to itself, and
    whether it is the last of its run.
  """
  # Both in one number, which sorts faster than two.
  keys = jnp.sort(2 * tokens_UM + counted_UM, axis=1)
  ids, counted = keys >> 1, keys & 1
  changes = ids[:, 1:] != ids[:, :-1]
  is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
  is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
  sums = jnp.cumsum(counted, axis=1)
  # Sums do not fall, so the largest start of a run is that of this one.
  before = jax.lax.cummax(jnp.where(is_first, sums - counted, 0), axis=1)
  return ids, sums - before, is_last
