"""Writes what a step needs into its one buffer."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.layout import Layout
from jaxserve.engine.request import Continuation
from jaxserve.engine.runner import Runner


@dataclasses.dataclass(frozen=True)
class Filled:
  """A step ready to run.

  Attributes:
    layout: Which program.
    buffer: Its input.
    sampling: Per sampled row, whose token it is.
  """

  layout: Layout
  buffer: np.ndarray
  sampling: list[Continuation]


def fill(
  runner: Runner,
  config: EngineConfig,
  scheduled: Sequence[tuple[Continuation, int]],
) -> Filled:
  """The step that computes the next tokens of each, in rows of the batch."""
  scheduled = sorted(scheduled, key=lambda item: item[0].row)
  layout = runner.layout_for(sum(count for _, count in scheduled))
  buffer, f = layout.empty()
  page_size = config.page_size
  start, sampling = 0, []
  for c, count in scheduled:
    stop = start + count
    first, last = c.num_computed, c.num_computed + count
    known = c.tokens[first:last]
    f['tokens'][start:stop] = known + [-1] * (count - len(known))
    positions = np.arange(first, last)
    f['positions'][start:stop] = positions
    pages = np.asarray(c.pages)
    f['slot'][start:stop] = (
      pages[positions // page_size] * page_size + positions % page_size
    )
    f['token_row'][start:stop] = c.row
    f['query_start'][c.row + 1 :] = stop
    f['kv_len'][c.row] = last
    f['page_table'][c.row, : len(pages)] = pages
    if last == c.num_tokens:
      _fill_sampling(f, len(sampling), c, stop - 1)
      sampling.append(c)
    start = stop
  return Filled(layout, buffer, sampling)


def _fill_sampling(f, u, c, index):
  f['sample_index'][u] = index
  f['sample_row'][u] = c.row
  f['seed'].view(np.uint32)[u] = c.seed
  p = c.params
  f['temperature'][u] = p.temperature
  f['top_k'][u] = p.top_k
  f['top_p'][u] = p.top_p
  f['min_p'][u] = p.min_p
  f['num_logprobs'][u] = -1 if p.logprobs is None else p.logprobs
