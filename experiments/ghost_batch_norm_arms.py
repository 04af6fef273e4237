"""Arms of the comparison of `ghost_batch_norm_recipe`, runs and choices."""

from collections.abc import Iterator
import dataclasses
import json
import pathlib

import numpy as np

from experiments import ghost_batch_norm_runs as runs
from experiments.ghost_batch_norm_records import share_of

SETTINGS = {
  'digits, split 0': runs.Setting(),
  'digits, split 1': runs.Setting(split_seed=1),
  'mnist at 7x7': runs.Setting(
    images='mnist', pool=4, num_valid=512, num_test=3976
  ),
}
RATES = (0.02, 0.05, 0.1, 0.2, 0.4)
GHOST_SIZES = (16, 32, 64)
CLIP_NORM = 5.0
# (ours - from) / (small - from)
SHARES = (
  ('ghost', 'large'),
  ('ghost', 'rate'),
  ('ghost_tuned', 'large_tuned'),
  ('adapted', 'large'),
  ('adapted', 'large_tuned'),
)


def arms(setting: runs.Setting, ghost_size: int) -> dict[str, runs.Arm]:
  """Of the module's list, by name."""
  large, ratio = setting.large_batch, setting.large_batch / setting.small_batch
  small = runs.Arm(setting.small_batch, setting.epochs)
  naive = dataclasses.replace(small, batch=large)
  rate = dataclasses.replace(naive, rate_factor=ratio**0.5, clip_norm=CLIP_NORM)
  ghost = dataclasses.replace(rate, ghost_size=ghost_size)
  adapted = dataclasses.replace(ghost, epochs=round(ratio * setting.epochs))
  return dict(
    small=small,
    large=naive,
    rate=rate,
    ghost=ghost,
    adapted=adapted,
    large_tuned=rate,
    ghost_tuned=ghost,
  )


class Runs:
  """Runs of one setting, kept in a file of JSON lines.

  Args:
    path: The file; others' lines are left alone.
    name: Of the setting.
    setting: Images and network.
    about: More to write of each run, such as versions.
    make: Makes the function that trains; `runs.make_training`.
  """

  def __init__(
    self,
    path: pathlib.Path,
    name: str,
    setting: runs.Setting,
    about: dict,
    make=runs.make_training,
  ):
    self.setting = setting
    self._path, self._about, self._make = path, about, make
    self._of = json.dumps([name, dataclasses.asdict(setting)])
    self._train, self._found = None, {}
    for line in path.read_text().splitlines() if path.exists() else ():
      record = json.loads(line)
      if json.dumps([record['name'], record['setting']]) == self._of:
        key = json.dumps([record['arm'], record['rate'], record['seed']])
        self._found[key] = record

  def get(self, arm: runs.Arm, rate: float, seed: int) -> dict:
    """The record of a run, which is made if it is not there."""
    how = dataclasses.asdict(arm)
    key = json.dumps([how, rate, seed])
    if key not in self._found:
      self._train = self._train or self._make(self.setting)
      result = self._train(arm, rate, seed)
      name, setting = json.loads(self._of)
      record = dict(name=name, arm=how, rate=rate, seed=seed) | result
      record |= dict(setting=setting) | self._about
      with self._path.open('a') as f:
        f.write(json.dumps(record) + '\n')
      self._found[key] = record
    return self._found[key]

  def valid(self, arm: runs.Arm, rate: float, seeds: list[int]) -> float:
    """Mean accuracy of validation images."""
    return float(
      np.mean([self.get(arm, rate, s)['valid_accuracy'] for s in seeds])
    )


def choose(found: Runs, seeds: list[int]) -> tuple[int, dict[str, float]]:
  """The size of virtual batches, and the learning rate of every arm.

  Of equals the least. `found.setting.ghost_size` is not looked at.
  """
  of = lambda size: arms(found.setting, size)
  best = lambda values, score: max(sorted(values), key=score)
  by_rate = lambda arm: best(RATES, lambda r: found.valid(arm, r, seeds))
  rate = by_rate(of(GHOST_SIZES[0])['small'])
  size = best(
    GHOST_SIZES, lambda size: found.valid(of(size)['ghost'], rate, seeds)
  )
  rates = dict.fromkeys(of(size), rate)
  for name in ('large_tuned', 'ghost_tuned'):
    rates[name] = by_rate(of(size)[name])
  return size, rates


def report(
  found: Runs, tune_seeds: list[int], seeds: list[int], names: list[str]
) -> Iterator[str]:
  """Lines of Markdown; runs what is missing."""
  size, rates = choose(found, tune_seeds)
  of, accuracy = arms(found.setting, size), {}
  yield '| arm | batch | virtual | epochs | learning rate | test accuracy, % |'
  yield '|---|---|---|---|---|---|'
  for name in names:
    arm = of[name]
    accuracy[name] = np.array(
      [found.get(arm, rates[name], s)['test_accuracy'] for s in seeds]
    )
    mean, std = accuracy[name].mean(), accuracy[name].std(ddof=1)
    yield (
      f'| {name} | {arm.batch} | {arm.ghost_size or "-"} | {arm.epochs} '
      f'| {arm.rate_factor * rates[name]:.3g} '
      f'| {100 * mean:.2f} ± {100 * std:.2f} |'
    )
  yield ''
  for ours, origin in SHARES:
    if ours in accuracy and origin in accuracy and 'small' in accuracy:
      share, low, high = share_of(
        accuracy['small'], accuracy[origin], accuracy[ours]
      )
      yield (
        f'{ours} closes {share:.0%} of the gap of {origin} '
        f'(90% of resampled seeds: {low:.0%} to {high:.0%})'
      )
