"""Quantile of what prompts of a similar length have generated lately.

Jin et al., "S3: Increasing GPU Utilization during Generative Inference for
Higher Throughput", NeurIPS 2023, https://arxiv.org/abs/2306.06000, sections 3.1
and 3.3: lengths are classified into buckets, and the predictor keeps learning
from what was served.

Deviation: the paper classifies the *text* with a fine-tuned DistilBERT. This
one sees no text, only how long the prompt is; it costs nothing and needs no
training, and knows no more than the correlation of the two lengths.
"""

import bisect
import collections
import math

from jaxserve.schedulers.predictors import base


def history(
  quantile: float = 0.5, memory: int = 512, min_count: int = 8
) -> base.Predictor:
  """Learns online, per power of two of the prompt length.

  Args:
    quantile: Which of the observed lengths to expect. The median ranks best; a
      high one is seldom overrun.
    memory: Requests remembered per bucket.
    min_count: Requests a bucket needs before it is asked; until then all of
      them are, and `max_tokens` before any.

  Raises:
    ValueError: `quantile` is not in (0, 1], or a count is below 1.
  """
  if not 0 < quantile <= 1:
    raise ValueError(f'quantile={quantile} must be in (0, 1]')
  if memory < 1 or min_count < 1:
    raise ValueError(f'memory={memory} and min_count={min_count} must be >= 1')
  return History(quantile, memory, min_count)


class History:
  """The predictor."""

  def __init__(self, quantile, memory, min_count):
    self._quantile = quantile
    self._min_count = min_count
    self._buckets = collections.defaultdict(lambda: _Window(memory))
    self._all = _Window(memory)

  def __call__(self, prompt, max_tokens):
    window = self._buckets.get(len(prompt).bit_length(), self._all)
    if len(window) < self._min_count:
      window = self._all
    if not len(window):
      return float(max_tokens)
    return float(min(window.quantile(self._quantile), max_tokens))

  def observe(self, prompt, num_generated):
    """Takes note of a request that has ended."""
    self._buckets[len(prompt).bit_length()].add(num_generated)
    self._all.add(num_generated)


class _Window:
  """The last numbers added, sorted."""

  def __init__(self, size):
    self._size = size
    self._by_age = collections.deque()
    self._sorted = []

  def __len__(self):
    return len(self._sorted)

  def add(self, value):
    if len(self._by_age) == self._size:
      oldest = self._by_age.popleft()
      del self._sorted[bisect.bisect_left(self._sorted, oldest)]
    self._by_age.append(value)
    bisect.insort(self._sorted, value)

  def quantile(self, q):
    return self._sorted[math.ceil(q * len(self._sorted)) - 1]
