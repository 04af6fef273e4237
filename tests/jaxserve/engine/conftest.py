"""Steps of a runner without an engine."""

import dataclasses

import numpy as np
import pytest


@dataclasses.dataclass
class Driver:
  """Runs steps of rows whose pages lie one after the other.

  Row r holds pages `r * pages_per_row ..`, in the order of its tokens.
  """

  runner: object
  page_size: int

  def buffer(self, tokens, layout=None, **sampling):
    """Layout and buffer of a step.

    Args:
      tokens: Row -> first position, and the tokens from there.
      layout: The smallest that fits by default.
      **sampling: Field -> row -> value; the last token of each row samples.
    """
    total = sum(len(t) for _, t in tokens.values())
    layout = layout or self.runner.layout_for(total)
    buffer, f = layout.empty()
    f['page_table'][:] = np.arange(f['page_table'].size).reshape(
      f['page_table'].shape
    )
    start = 0
    for u, row in enumerate(sorted(tokens)):
      first, ids = tokens[row]
      stop = start + len(ids)
      positions = np.arange(first, first + len(ids))
      f['tokens'][start:stop] = ids
      f['positions'][start:stop] = positions
      page = f['page_table'][row, positions // self.page_size]
      f['slot'][start:stop] = page * self.page_size + positions % self.page_size
      f['token_row'][start:stop] = row
      f['query_start'][row + 1 :] = stop
      f['kv_len'][row] = first + len(ids)
      f['sample_index'][u] = stop - 1
      f['sample_row'][u] = row
      for name, values in sampling.items():
        if row in values:
          f[name][u] = values[row]
      start = stop
    return layout, buffer

  def step(self, tokens, **sampling):
    """What one step samples."""
    return self.runner.run(*self.buffer(tokens, **sampling)).read()

  def decode_at_once(self, tokens, steps_left, stop_ids=(), **sampling):
    """Row -> tokens of one call of several steps, and the result read."""
    layout = self.runner.decode_layout_for(len(tokens))
    layout, buffer = self.buffer(tokens, layout, **sampling)
    views = layout._views(buffer)
    for u, row in enumerate(sorted(tokens)):
      views['steps_left'][u] = steps_left[row]
      views['stop_ids'][u, : len(stop_ids)] = stop_ids
    read = self.runner.run(layout, buffer).read()
    return {
      row: tuple(read.tokens[: read.num_valid[u], u].tolist())
      for u, row in enumerate(sorted(tokens))
    }, read

  def decode(self, tokens, count, **sampling):
    """Row -> `count` tokens that follow; none goes through the host."""
    results, first = [], tokens
    for _ in range(count):
      results.append(self.runner.run(*self.buffer(first, **sampling)))
      first = {r: (p + len(ids), [-1]) for r, (p, ids) in first.items()}
    read = np.stack([r.read().tokens for r in results], axis=1)
    return {row: tuple(read[u]) for u, row in enumerate(sorted(tokens))}


@pytest.fixture
def make_driver():
  return Driver


@pytest.fixture
def driver(small_runner, small_engine):
  return Driver(small_runner, small_engine.page_size)
