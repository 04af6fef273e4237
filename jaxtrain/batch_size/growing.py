"""Batches that grow with the noise scale while a run goes on.

As AdLoCo grows them (Kutuzov et al., https://arxiv.org/abs/2508.18182), by the
rule of `adaptive` and the noise scale of `noise_scale`. A large batch is
several small ones of the dataset side by side, so the order of rows does not
depend on when the batch grew, and every row is used once.
`jaxtrain.loop.train` tells the iterator each step's metrics as it reads them,
one step late, and compiles a program for each size when it first comes: the
size of step n + 1 follows from steps up to n - 1, whether or not step n is
known by then. Where a run stands is part of the iterator's state, so a resumed
run grows as an uninterrupted one.
"""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from jaxtrain.batch_size import adaptive as adaptive_lib
from jaxtrain.batch_size import noise_scale as noise_scale_lib


def growing(
  dataset: Iterable[dict[str, np.ndarray]],
  *,
  rows: int,
  seq_len: int,
  max_rows: int,
  tolerance: float = 1.0,
  patience: int = 100,
  decay: float = 0.99,
) -> 'Growing':
  r"""A dataset whose batches double where the noise scale asks for it.

  Args:
    dataset: Batches of `rows` rows in all, of which this process has its share.
    rows: Rows of the first batches.
    seq_len: T, tokens of a row.
    max_rows: No batch has more.
    tolerance: :math:`\eta`, see `adaptive`.
    patience: Steps between two changes at least.
    decay: Of the averages of the noise scale.

  Raises:
    ValueError: As `adaptive` and `noise_scale`.
  """
  unit = rows * seq_len
  rule = adaptive_lib.adaptive(
    unit,
    max_rows * seq_len,
    unit=unit,
    tolerance=tolerance,
    patience=patience,
  )
  return Growing(dataset, rule, noise_scale_lib.noise_scale(decay))


@dataclasses.dataclass(frozen=True)
class Growing:
  """What `growing` makes: an iterable of batches, each time from the start."""

  dataset: Iterable[dict[str, np.ndarray]]
  rule: adaptive_lib.Adaptive
  estimator: noise_scale_lib.NoiseScale

  def __iter__(self) -> 'GrowingIterator':
    return GrowingIterator(self)


class GrowingIterator:
  """Iterator over growing batches that can be saved and restored exactly.

  Attributes:
    num_shapes: How many shapes batches can have.
    state: Of the rule, as of the last step that was observed: what is consumed
      are the positions of all observed steps' batches.
    tokens: Tokens of these batches by their weights: no padding.
  """

  def __init__(self, growing: Growing):
    self._iterator = iter(growing.dataset)
    self._rule, self._estimator = growing.rule, growing.estimator
    self._update = jax.jit(growing.estimator.update)
    self.num_shapes = len(growing.rule.sizes)
    self.state = growing.rule.init()
    self.tokens = 0
    self._ahead = collections.deque()  # Sizes of steps not observed yet,
    # and of batches to come.
    self._sizes = collections.deque([self.state.batch_size] * 2)
    self._noise = growing.estimator.init()

  def __iter__(self) -> 'GrowingIterator':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._sizes:
      raise RuntimeError(f'{len(self._ahead)} steps were not observed yet')
    count = self._sizes[0] // self._rule.sizes[0]
    parts = [next(self._iterator) for _ in range(count)]
    self._ahead.append(self._sizes.popleft())
    if count == 1:
      return parts[0]
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

  def observe(self, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Takes note of a step.

    Args:
      metrics: Of the oldest step that was not, by
        `make_train_step(..., noise_scale=True)`.

    Returns:
      Metrics to write: 'batch_size' of the next step but one, 'noise_scale',
      and 'tokens' trained on so far.

    Raises:
      ValueError: The step does not measure the noise scale.
    """
    if 'grad_square_small' not in metrics:
      raise ValueError('growing batches need noise_scale=True of the step')
    small = {k: metrics[k] for k in _MEASURED}
    self._noise = jax.device_get(self._update(self._noise, small))
    scale = float(self._estimator.read(self._noise)['noise_scale'])
    consumed = self.state.consumed + self._ahead.popleft()
    state = self._rule.update(self.state, scale)
    # The step may have begun before the last change of size.
    self.state = dataclasses.replace(state, consumed=consumed)
    self._sizes.append(self.state.batch_size)
    self.tokens += round(float(metrics['weight']))
    return dict(
      batch_size=self.state.batch_size,
      noise_scale=scale,
      tokens=float(self.tokens),
    )

  def get_state(self) -> dict[str, Any]:
    """Where the iterator stands: a small dict of JSON types.

    Raises:
      RuntimeError: A step was not observed yet.
    """
    if self._ahead:
      raise RuntimeError(f'{len(self._ahead)} steps were not observed yet')
    return dict(
      rows=self._iterator.get_state(),
      rule=dataclasses.asdict(self.state),
      sizes=list(self._sizes),
      noise=[float(x) for x in self._noise],
      tokens=self.tokens,
    )

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken.

    Raises:
      ValueError: A state of other rows, or of a rule with other sizes.
    """
    if 'rule' not in state:
      raise ValueError('the saved data state is not one of growing batches')
    rule = adaptive_lib.State(**state['rule'])
    if rule.batch_size not in self._rule.sizes:
      raise ValueError(
        f'the saved batch size {rule.batch_size} is not one of '
        f'{self._rule.sizes}'
      )
    self._iterator.set_state(state['rows'])
    self.state, self.tokens = rule, state['tokens']
    self._sizes = collections.deque(state['sizes'])
    self._noise = noise_scale_lib.State(*map(np.float32, state['noise']))


_MEASURED = (
  'grad_square_small',
  'grad_square_big',
  'batch_size_small',
  'batch_size_big',
)
