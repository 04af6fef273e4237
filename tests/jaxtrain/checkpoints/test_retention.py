"""The newest, every so many steps, the best: what any rule keeps is kept."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints import retention
from jaxtrain.checkpoints.manager import CheckpointManager

_STATE = {'params': jnp.ones(2)}


@dataclasses.dataclass(frozen=True)
class _Info:
  step: int


def _kept(steps, metrics, keep, keep_every=None, keep_best=None):
  """Steps left after saving one after the other, deleting each time."""
  policy = retention.policy(
    keep, keep_every, keep_best, lambda step: metrics.get(step, {})
  )
  left = []
  for step in steps:
    left.append(_Info(step))
    stay = policy.should_preserve(left, context=None)
    left = [c for c, s in zip(left, stay, strict=True) if s]
  return [c.step for c in left]


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('mode', ['min', 'max'])
def test_equals_the_definition(seed, mode):
  """One by one, the best of all are never deleted on the way."""
  rng = np.random.default_rng(seed)
  steps = sorted(rng.choice(100, 30, replace=False).tolist())
  measured = [s for s in steps if rng.random() < 0.6]
  metrics = {s: {'eval_loss': float(rng.integers(8))} for s in measured}
  keep, every, count = rng.integers(1, 5, 3).tolist()
  every *= 5
  kept = _kept(steps, metrics, keep, every, ('eval_loss', mode, count))
  sign = 1 if mode == 'min' else -1
  best = sorted(measured, key=lambda s: (sign * metrics[s]['eval_loss'], -s))
  for_good = [s for s in steps if s % every == 0]
  assert kept == sorted({*steps[-keep:], *best[:count], *for_good})


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_no_number_is_never_the_best(bad):
  metrics = {1: {'m': 3.0}, 2: {'m': bad}, 3: {'other': 0.0}, 4: {}}
  assert _kept([1, 2, 3, 4], metrics, 1, None, ('m', 'min', 2)) == [1, 4]
  assert _kept([1, 2, 3, 4], metrics, 1, None, ('m', 'max', 2)) == [1, 4]


def test_all_are_kept():
  assert _kept(range(9), {}, None) == list(range(9))


def test_the_rules_together_on_disk_and_over_runs(tmp_path):
  losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 3.0, 6: 2.0, 7: 9.0}
  options = dict(keep=1, keep_every=3, keep_best=('eval_loss', 'min', 2))
  for steps in ([1, 2, 3], [4, 5, 6, 7]):  # The second run reads the metrics.
    with CheckpointManager(tmp_path, **options) as manager:
      for step in steps:
        loss = losses[step]
        metrics = {'loss': 0.5} | ({} if loss is None else {'eval_loss': loss})
        manager.save(step, _STATE, metrics=metrics)
  names = sorted(int(p.name) for p in tmp_path.iterdir())
  assert names == [2, 3, 6, 7]  # Best two: 2 and 6; 3 and 6 for good; newest 7.
  with CheckpointManager(tmp_path) as manager:
    assert manager.metrics(6) == {'loss': 0.5, 'eval_loss': 2.0}
    assert manager.metrics(7)['eval_loss'] == 9.0


def test_unreadable_metrics_are_none(tmp_path):
  options = dict(keep=1, keep_best=('m', 'max', 1))
  with CheckpointManager(tmp_path, **options) as manager:
    manager.save(1, _STATE, metrics={'m': 5})
  path = tmp_path / '00000001' / 'meta' / 'metadata'
  assert json.loads(path.read_text())['metrics'] == {'m': 5.0}
  path.write_text('{')
  with CheckpointManager(tmp_path, **options) as manager:
    assert manager.metrics(1) == {}
    manager.save(2, _STATE, metrics={'m': 1})
    manager.save(3, _STATE)
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 3]


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(keep=0), 'keep=0 must be at least 1'),
    (dict(keep_every=0), 'keep_every=0 must be at least 1'),
    (dict(keep_best='eval_loss'), "keep_best='eval_loss' must be"),
    (dict(keep_best=('eval_loss', 'least', 1)), "'min' or 'max'"),
    (dict(keep_best=('eval_loss', 'min', 0)), 'how many'),
    (dict(keep_best=('eval_loss', 'min')), 'how many'),
  ],
)
def test_wrong_arguments(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    CheckpointManager(tmp_path, **options)
