"""What the trials of `large_batch` say: knees, losses, pictures.

Steps to a target are those of the best trial of an optimizer and a batch size,
as in Shallue et al., "Measuring the Effects of Data Parallelism on Neural
Network Training", https://arxiv.org/abs/1811.03600, section 4; every optimizer
has had as many trials (Nado et al., "A Large Batch Optimizer Reality Check",
https://arxiv.org/abs/2102.06356).
"""

from collections.abc import Mapping, Sequence
import math
import os
from typing import Any

import matplotlib.figure
import numpy as np

from jaxtrain.batch_size import critical_batch
from jaxtrain.batch_size import noise_scale

Record = Mapping[str, Any]


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
  """Step at which the loss falls to `target`, or `None`.

  Between evaluations the loss is linear in the logarithm of the step.
  """
  before = None
  for step, loss in curve:
    if loss <= target:
      if before is None or before[1] <= loss:
        return float(step)
      part = (before[1] - target) / (before[1] - loss)
      return before[0] * (step / before[0]) ** part
    before = step, loss
  return None


def loss_at(record: Record) -> float:
  """Held-out loss after `tokens`; infinite if the trial diverged before."""
  task = record['task']
  budget = max(1, task['tokens'] // (record['batch_size'] * task['seq_len']))
  return dict(map(tuple, record['curve'])).get(budget, math.inf)


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
  """A row for each optimizer and batch size: the best of its trials.

  'steps' is `None` where no trial reached the target; 'edge' says that the best
  learning rate is the smallest or the largest that was tried.
  """
  rows = []
  for name, batch_size in sorted(
    {(r['optimizer'], r['batch_size']) for r in records}
  ):
    own = [
      r
      for r in records
      if (r['optimizer'], r['batch_size']) == (name, batch_size)
    ]
    tuned = [r for r in own if r['seed'] == 0]
    target = own[0]['task']['target']
    best = min(tuned, key=loss_at)
    steps = [s for r in tuned if (s := steps_to(r['curve'], target))]
    rates = sorted(r['learning_rate'] for r in tuned)
    again = [loss_at(r) for r in own if r['trial'] == best['trial']]
    rows.append(
      dict(
        optimizer=name,
        batch_size=batch_size,
        tokens=batch_size * best['task']['seq_len'],
        trials=len(tuned),
        diverged=sum(r['diverged'] for r in tuned),
        loss=float(np.mean(again)),
        spread=float(np.ptp(again)),
        seeds=len(again),
        steps=min(steps, default=None),
        learning_rate=best['learning_rate'],
        momentum=best['momentum'],
        edge=best['learning_rate'] in (rates[0], rates[-1]),
      )
    )
  return rows


def knee(rows: Sequence[Record], optimizer: str) -> dict[str, float] | None:
  """Critical batch sizes, in tokens, from an optimizer's steps to the target.

  Returns:
    'overhead': where steps are 20 % above linear scaling; 'trade_off': where
    both steps and tokens are twice their minimum; see
    `jaxtrain.batch_size.critical_batch`. `None` if fewer than three batch sizes
    reached the target.
  """
  points = [
    (r['tokens'], r['steps'])
    for r in rows
    if r['optimizer'] == optimizer and r['steps']
  ]
  if len(points) < 3:
    return None
  tokens, steps = zip(*points, strict=True)
  return dict(
    overhead=critical_batch.critical_batch(tokens, steps),
    trade_off=critical_batch.fit_trade_off(tokens, steps).critical,
  )


def noise_scales(record: Record) -> list[tuple[float, float, float]]:
  """(tokens so far, held-out loss, noise scale in tokens) along a trial.

  Averaged over the last few evaluations, numerator and denominator by
  themselves.
  """
  task = record['task']
  per_step = record['batch_size'] * task['seq_len']
  estimator = noise_scale.noise_scale(decay=0.7)
  state, found = estimator.init(), []
  for (step, loss), (_, small, big) in zip(
    record['curve'], record['noise'], strict=True
  ):
    metrics = dict(
      grad_square_small=small,
      grad_square_big=big,
      batch_size_small=per_step / task['groups'],
      batch_size_big=per_step,
    )
    state = estimator.update(state, metrics)
    scale = float(estimator.read(state)['noise_scale'])
    found.append((step * per_step, loss, scale))
  return found


def predicted(records: Sequence[Record], optimizer: str) -> float | None:
  """The critical batch size, in tokens, that the noise scale predicts.

  Its average over the tokens until the target is reached, in the best trial at
  the smallest batch size, which the noise scale is not used to choose
  (McCandlish et al., https://arxiv.org/abs/1812.06162, section 2.4: the noise
  scale averaged over training is the critical batch size of all of it).
  """
  own = [
    r
    for r in records
    if r['optimizer'] == optimizer and steps_to(r['curve'], r['task']['target'])
  ]
  if not own:
    return None
  least = min(r['batch_size'] for r in own)
  best = min((r for r in own if r['batch_size'] == least), key=loss_at)
  target, total, before = best['task']['target'], 0.0, 0.0
  for tokens, loss, scale in noise_scales(best):
    if math.isfinite(scale):
      total += scale * (tokens - before)
      before = tokens
    if loss <= target:
      break
  return total / before if before else None


def draw(records: Sequence[Record], path: str | os.PathLike) -> None:
  """Steps to the target and loss at equal tokens against batch size."""
  rows = table(records)
  figure = matplotlib.figure.Figure((11, 4.2), layout='constrained')
  steps_axes, loss_axes = figure.subplots(1, 2)
  target = records[0]['task']['target']
  for i, name in enumerate(sorted({r['optimizer'] for r in rows})):
    own = [r for r in rows if r['optimizer'] == name]
    color = f'C{i}'
    reached = [r for r in own if r['steps']]
    if reached:
      x = [r['tokens'] for r in reached]
      y = [r['steps'] for r in reached]
      steps_axes.plot(x, y, marker='o', color=color, label=name)
      if len(x) > 1:
        perfect = critical_batch.perfect_scaling(x, y)
        steps_axes.plot(x, perfect, ':', color=color, alpha=0.4)
    fit = knee(rows, name)
    if fit and math.isfinite(fit['overhead']):
      steps_axes.axvline(fit['overhead'], color=color, alpha=0.5)
    if scale := predicted(records, name):
      steps_axes.axvline(scale, color=color, alpha=0.5, linestyle='--')
    loss_axes.errorbar(
      [r['tokens'] for r in own],
      [r['loss'] for r in own],
      [r['spread'] / 2 for r in own],
      marker='o',
      capsize=3,
      color=color,
      label=name,
    )
  steps_axes.set_title(f'Steps to {target:g} nats; dotted: perfect scaling')
  steps_axes.set_ylabel('steps; vertical: knees, dashed: of the noise scale')
  loss_axes.set_title(f'At equal tokens ({records[0]["task"]["tokens"]:,})')
  loss_axes.set_ylabel('held-out loss, nats per byte')
  for axes in (steps_axes, loss_axes):
    axes.set_xscale('log', base=2)
    axes.set_xlabel('tokens of a batch')
    axes.grid(alpha=0.3)
    axes.legend()
  steps_axes.set_yscale('log', base=2)
  figure.savefig(path, dpi=110)


def text(records: Sequence[Record]) -> str:
  """The table, the knees and what large batches cost, for a terminal."""
  rows = table(records)
  lines = [
    'optimizer  tokens/step  trials  loss at equal tokens   steps to target'
    '  learning rate'
  ]
  for r in rows:
    steps = f'{r["steps"]:.0f}' if r['steps'] else '-'
    edge = ' (edge of its range)' if r['edge'] else ''
    lines.append(
      f'{r["optimizer"]:9}  {r["tokens"]:11,}  {r["trials"]:6}  '
      f'{r["loss"]:8.4f} +- {r["spread"] / 2:.4f}    {steps:>15}  '
      f'{r["learning_rate"]:.2e}{edge}'
    )
  for name in sorted({r['optimizer'] for r in rows}):
    fit, scale = knee(rows, name), predicted(records, name)
    if fit and scale:
      lines.append(
        f'{name}: critical batch {fit["overhead"]:,.0f} tokens (20 % above '
        f'linear scaling), {fit["trade_off"]:,.0f} (trade-off); the noise '
        f'scale predicts {scale:,.0f}'
      )
  return '\n'.join(lines)
