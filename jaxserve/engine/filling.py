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
    scheduled: Whom it runs, and how many tokens of each.
    starts: Where the tokens of each begin in the step.
    firsts: And in the sequence.
    sampling: Per row of logits, whose they are.
    targets: Per row of logits, the prompt token to look up, or -1 to sample.
  """

  layout: Layout
  buffer: np.ndarray
  scheduled: list[tuple[Continuation, int]]
  starts: list[int]
  firsts: list[int]
  sampling: list[Continuation]
  targets: list[int]


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
        ('wants_processed', np.int32),
        ('prompt_len', np.int32),
        ('features', np.int32),
        ('min_position', np.int32),
        ('presence_penalty', np.float32),
        ('frequency_penalty', np.float32),
        ('repetition_penalty', np.float32),
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
      wants_processed=p.processed_logprobs,
      prompt_len=c.prompt_len,
      features=c.features.bits,
      min_position=c.prompt_len + p.min_tokens,
      presence_penalty=p.presence_penalty,
      frequency_penalty=p.frequency_penalty,
      repetition_penalty=p.repetition_penalty,
    )
    for name, value in values.items():
      self._sampling[name][c.row] = value
    if c.features.bits:
      self._runner.set_row(
        c.row,
        tokens=c.tokens,
        bias_ids=list(c.features.bias),
        bias=list(c.features.bias.values()),
        stop_ids=c.features.stop_ids,
        mask=c.features.mask,
      )

  def fill(self, scheduled: Sequence[tuple[Continuation, int]]) -> Filled:
    """The step that computes the next tokens of each, in rows of the batch.

    Prompts whose tokens are looked up advance by as many tokens as there are
    rows of logits to spare.
    """
    scheduled = sorted(scheduled, key=_row)
    has_lookups = any(_wants_lookup(c) for c, _ in scheduled)
    if has_lookups:
      scheduled = self._limit_lookups(scheduled)
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
    tokens, sampling, index = [], [], []
    for c, count in scheduled:
      last = c.num_computed + count
      known = c.tokens[c.num_computed : last]
      tokens += known
      if len(known) < count:
        tokens += [-1] * (count - len(known))
      if last == c.num_tokens:
        sampling.append(c)
        index.append(len(tokens) - 1)
    f['tokens'][:total] = tokens
    self._fill_sampling(f, sampling, index)
    targets = [-1] * len(sampling)
    starts = starts.tolist()
    if has_lookups:
      for (c, count), start in zip(scheduled, starts, strict=True):
        if _wants_lookup(c):
          self._fill_lookups(f, c, count, start, sampling, targets)
    return Filled(
      layout,
      buffer,
      scheduled,
      starts,
      first.tolist(),
      sampling,
      targets,
    )

  def fill_many(self, scheduled: Sequence[tuple[Continuation, int]]) -> Filled:
    """Several steps in which all decode: one after the other, each its count.

    The pages of all steps are theirs already.
    """
    scheduled = sorted(scheduled, key=_row)
    n = len(scheduled)
    rows = np.array([c.row for c, _ in scheduled])
    first = np.array([c.num_computed for c, _ in scheduled])
    layout = self._runner.decode_layout_for(n)
    buffer, f = layout.empty()
    self._update_pages(scheduled)
    page, offset = np.divmod(first, self._page_size)
    f['positions'][:n] = first
    f['token_row'][:n] = rows
    f['slot'][:n] = self._page_table[rows, page] * self._page_size + offset
    f['page_table'][rows] = self._page_table[rows]
    f['kv_len'][rows] = first + 1
    f['query_start'][rows + 1] = 1
    np.cumsum(f['query_start'], out=f['query_start'])
    for u, (c, count) in enumerate(scheduled):
      f['tokens'][u] = (c.tokens[c.num_computed :] or [-1])[0]
      f['steps_left'][u] = count
      f['stop_ids'][u, : len(c.stop_ids)] = list(c.stop_ids)
    sampling = [c for c, _ in scheduled]
    self._fill_sampling(f, sampling, np.arange(n))
    return Filled(
      layout,
      buffer,
      scheduled,
      list(range(n)),
      first.tolist(),
      sampling,
      [-1] * n,
    )

  def _limit_lookups(self, scheduled):
    spare = len(self._num_pages) - sum(
      c.num_computed + count == c.num_tokens and not _wants_lookup(c)
      for c, count in scheduled
    )
    limited = []
    for c, count in scheduled:
      if _wants_lookup(c):
        count = min(count, spare)
        spare -= count
      if count:
        limited.append((c, count))
    return limited

  def _update_pages(self, scheduled):
    for c, _ in scheduled:
      n = self._num_pages[c.row]
      if n != len(c.pages):
        self._page_table[c.row, n : len(c.pages)] = c.pages[n:]
        self._num_pages[c.row] = len(c.pages)

  def _fill_sampling(self, f, sampling, index):
    n, rows = len(sampling), np.array([c.row for c in sampling], int)
    f['sample_index'][:n] = index
    f['sample_row'][:n] = rows
    for name, table in self._sampling.items():
      f[name].view(table.dtype)[:n] = table[rows]

  def _fill_lookups(self, f, c, count, start, sampling, targets):
    """Asks for the log-probability of the prompt's next tokens."""
    first = c.num_computed
    for position in range(first, min(first + count, c.prompt_len - 1)):
      if position + 1 <= c.num_looked_up:
        continue  # Known from before it was preempted.
      u = len(sampling)
      f['sample_index'][u] = start + position - first
      f['target'][u] = target = c.tokens[position + 1]
      f['num_logprobs'][u] = c.params.prompt_logprobs
      sampling.append(c)
      targets.append(target)
      c.num_looked_up = position + 1


def _row(item):
  return item[0].row


def _wants_lookup(c):
  return (
    c.params.prompt_logprobs is not None
    and c.index == 0
    and c.num_looked_up < c.prompt_len - 1
  )
