"""Which checkpoints are kept: the newest, every so many steps, the best."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math

import orbax.checkpoint as ocp

_MODES = ('min', 'max')


@dataclasses.dataclass(frozen=True)
class Best:
  """Keeps the `count` best checkpoints by a metric saved with them.

  One saved without the metric, or where it is no finite number, is not among
  the best; it is kept only if another rule keeps it. Of equals the newer is the
  better. (Orbax's `BestN` stops at a metric of another name, and ranks what is
  no number anywhere.)

  Attributes:
    metric: Its name, such as 'eval_loss'.
    mode: 'min' or 'max'.
    count: How many to keep.
    metrics_of: The metrics of a step.
  """

  metric: str
  mode: str
  count: int
  metrics_of: Callable[[int], Mapping[str, float]]

  def should_preserve(self, checkpoints, *, context) -> Sequence[bool]:
    """See orbax's `PreservationPolicy`."""
    del context
    sign = -1 if self.mode == 'min' else 1
    values = {}
    for c in checkpoints:
      value = self.metrics_of(c.step).get(self.metric)
      if value is not None and math.isfinite(value):
        values[c.step] = (sign * value, c.step)
    best = sorted(values, key=values.get, reverse=True)[: self.count]
    return [c.step in best for c in checkpoints]


def policy(
  keep: int | None,
  keep_every: int | None,
  keep_best: Sequence | None,
  metrics_of: Callable[[int], Mapping[str, float]],
):
  """A checkpoint is kept if any of the rules keeps it.

  Args:
    keep: How many of the newest; `None` keeps all.
    keep_every: Steps that are a multiple of it are kept for good.
    keep_best: `(metric, 'min' or 'max', how many)`.
    metrics_of: The metrics of a step.

  Returns:
    Orbax's `PreservationPolicy`.

  Raises:
    ValueError: Numbers below 1, or `keep_best` is not of that form.
  """
  for name, value in dict(keep=keep, keep_every=keep_every).items():
    if value is not None and value < 1:
      raise ValueError(f'{name}={value} must be at least 1')
  rules = [ocp.checkpoint_managers.LatestN(keep)]
  if keep_every is not None:
    rules.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
  if keep_best is not None:
    rules.append(Best(*_parse(keep_best), metrics_of))
  return ocp.checkpoint_managers.AnyPreservationPolicy(rules)


def _parse(best):
  form = "(metric, 'min' or 'max', how many), such as ('eval_loss', 'min', 1)"
  if isinstance(best, str) or len(best) != 3:
    raise ValueError(f'keep_best={best!r} must be {form}')
  metric, mode, count = best
  if mode not in _MODES or not isinstance(count, int) or count < 1:
    raise ValueError(f'keep_best={best!r} must be {form}')
  return metric, mode, count
