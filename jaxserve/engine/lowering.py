"""Every program of a runner, by name, ready to be traced."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from jaxserve.cache.pages import Pages
from jaxserve.engine import page_copies
from jaxserve.engine import row_state
from jaxserve.engine.row_state import RowStore
from jaxserve.engine.step import Step

# Masks of one `set_masks` call; more take several.
MASKS_AT_ONCE = 16


def lowerings(
  step: Step, params: Any, pages: Pages, rows: RowStore
) -> dict[str, Callable[[], jax.stages.Lowered]]:
  """Functions that trace steps and what changes pages and rows between them.

  Args:
    step: What the steps are.
    params: Arrays, or their shapes.
    pages: The same.
    rows: The same.

  Returns:
    Functions by name, in the order in which the programs will be wanted: the
    smallest step, what is small, and the other steps.
  """
  sizes = step.sizes

  def lower_step(layout):
    *_, buffer = step.abstract_args(layout)
    return step.jitted(layout).lower(
      params, pages, rows.history, rows.words, buffer
    )

  def lower_setter(function, state, *shape):
    jitted = jax.jit(
      functools.partial(function, sizes),
      donate_argnums=0,
      out_shardings=step.replicated,
    )
    return jitted.lower(
      state, jax.ShapeDtypeStruct(shape, np.int32, sharding=step.replicated)
    )

  layouts = (*step.layouts.values(), *step.decode_layouts.values())
  in_order = sorted(layouts, key=lambda x: (x.num_steps, x.num_tokens))
  [first, *others] = [
    (x.name, functools.partial(lower_step, x)) for x in in_order
  ]
  return dict([first]) | {
    'set_row': lambda: lower_setter(row_state.set_row, rows, sizes.row_size),
    'set_masks': lambda: lower_setter(
      row_state.set_masks,
      rows.words,
      masks_at_once(sizes),
      sizes.num_mask_words + 1,
    ),
    **page_copies.programs(pages, step.replicated),
    **dict(others),
  }


def masks_at_once(sizes: row_state.RowSizes) -> int:
  """Masks that `set_masks` takes."""
  return min(MASKS_AT_ONCE, sizes.num_rows)
