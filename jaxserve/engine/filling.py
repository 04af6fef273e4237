"""Writes what a step needs into its one buffer.

What does not change from step to step (pages, sampling parameters) is kept in
tables, a row for each row of the batch, so that filling is a few NumPy calls,
however many requests run.
"""

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


class Filler:
  """Tables of the rows in use.

  Args:
    runner: Whose layouts are filled.
    config: Sizes.
  """

  def __init__(self, runner: Runner, config: EngineConfig):
    self._runner = runner
    self._page_size = config.page_size
    s = config.max_num_requests
    [layout, *_] = runner.layouts.values()
    self._page_table = np.zeros((s, layout.pages_per_row), np.int32)
    self._num_pages = [0] * s
    self._sampling = {
      name: np.zeros(s, dtype)
      for name, dtype in (
        ('seed', np.uint32),
        ('temperature', np.float32),
        ('top_k', np.int32),
        ('top_p', np.float32),
        ('min_p', np.float32),
        ('num_logprobs', np.int32),
      )
    }

  def enter(self, c: Continuation) -> None:
    """Notes what holds as long as a continuation keeps its row."""
    self._num_pages[c.row] = 0
    p = c.params
    values = dict(
      seed=c.seed,
      temperature=p.temperature,
      top_k=p.top_k,
      top_p=p.top_p,
      min_p=p.min_p,
      num_logprobs=-1 if p.logprobs is None else p.logprobs,
    )
    for name, value in values.items():
      self._sampling[name][c.row] = value

  def fill(self, scheduled: Sequence[tuple[Continuation, int]]) -> Filled:
    """The step that computes the next tokens of each, in rows of the batch."""
    scheduled = sorted(scheduled, key=lambda item: item[0].row)
    rows = np.array([c.row for c, _ in scheduled])
    counts = np.array([count for _, count in scheduled])
    first = np.array([c.num_computed for c, _ in scheduled])
    stops = np.cumsum(counts)
    starts, total = stops - counts, int(stops[-1])
    layout = self._runner.layout_for(total)
    buffer, f = layout.empty()
    f['positions'][:total] = positions = np.repeat(
      first - starts, counts
    ) + np.arange(total)
    f['token_row'][:total] = token_row = np.repeat(rows, counts)
    self._update_pages(scheduled)
    page, offset = np.divmod(positions, self._page_size)
    f['slot'][:total] = (
      self._page_table[token_row, page] * self._page_size + offset
    )
    f['page_table'][rows] = self._page_table[rows]
    f['kv_len'][rows] = first + counts
    f['query_start'][rows + 1] = counts
    np.cumsum(f['query_start'], out=f['query_start'])
    sampling, sampled = [], []
    f['tokens'][:total] = -1
    for i, (c, count) in enumerate(scheduled):
      last = c.num_computed + count
      known = c.tokens[c.num_computed : last]
      if known:
        f['tokens'][starts[i] : starts[i] + len(known)] = known
      if last == c.num_tokens:
        sampling.append(c)
        sampled.append(i)
    self._fill_sampling(f, rows[sampled], stops[sampled] - 1)
    return Filled(layout, buffer, sampling)

  def _update_pages(self, scheduled):
    for c, _ in scheduled:
      n = self._num_pages[c.row]
      if n != len(c.pages):
        self._page_table[c.row, n : len(c.pages)] = c.pages[n:]
        self._num_pages[c.row] = len(c.pages)

  def _fill_sampling(self, f, rows, index):
    n = len(rows)
    f['sample_index'][:n] = index
    f['sample_row'][:n] = rows
    for name, table in self._sampling.items():
      f[name].view(table.dtype)[:n] = table[rows]
