"""Several decode steps in one call: the host waits, and is waited for, once.

Letters: K steps, U rows that decode, S rows, n likely tokens returned.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.cache.pages import Pages
from jaxserve.engine.layout import Layout

# `(pages, history, fields) -> (pages, history, tokens [U], packed [U, 3+2n])`.
Once = Callable[..., tuple[Pages, jax.Array, jax.Array, jax.Array]]


def decode(
  once: Once,
  layout: Layout,
  fields: dict[str, jax.Array],
  page_size: int,
  pages: Pages,
  history: jax.Array,
) -> tuple[Pages, Any, jax.Array]:
  """Runs up to K steps, each fed with the tokens of the last.

  A row that is done (it drew a stop token, or has no steps left, or its logits
  were not finite) goes along as padding: it writes nothing, and nobody reads
  what it computes. With all rows done, the loop ends.

  Args:
    once: One step.
    layout: Of several steps.
    fields: Of the first one.
    page_size: Tokens of a page.
    pages: Pool; the rows' page tables have room for all steps.
    history: The rows' tokens.

  Returns:
    Pages, history and packed `[K, U, 3 + 2n]`, -1 where a row was done.
  """
  f, row = fields, fields['token_row']
  packed = jax.eval_shape(once, pages, history, f)[-1]
  told = jnp.full((layout.num_steps, *packed.shape), -1, jnp.int32)

  def body(carry):
    i, pages, history, told, positions, left = carry
    live = left > 0
    page = f['page_table'][row, positions // page_size]
    live_row = jnp.where(live, row, layout.num_rows)
    now = f | dict(
      tokens=jnp.where(i == 0, f['tokens'], -1),
      positions=positions,
      slot=jnp.where(live, page * page_size + positions % page_size, -1),
      kv_len=f['kv_len'].at[live_row].set(positions + 1, mode='drop'),
      sample_row=live_row,
    )
    pages, history, tokens, packed = once(pages, history, now)
    ends = (tokens[:, None] == f['stop_ids']).any(1) | (packed[:, 1] == 0)
    told = told.at[i].set(jnp.where(live[:, None], packed, -1))
    left = jnp.where(ends, 0, jnp.maximum(left - 1, 0))
    return i + 1, pages, history, told, positions + (left > 0), left

  def goes_on(carry):
    i, *_, left = carry
    return (i < layout.num_steps) & (left > 0).any()

  carry = jnp.int32(0), pages, history, told, f['positions'], f['steps_left']
  _, pages, history, told, *_ = jax.lax.while_loop(goes_on, body, carry)
  return pages, history, told
