r"""Ghost batch norm in the paper's whole recipe, on three splits of images.

python -m experiments.ghost_batch_norm_recipe

The columns of table 1 of Hoffer, Hubara and Soudry, "Train longer, generalize
better", https://arxiv.org/abs/1705.08741, each with what the one before has:

* small: the small batch, at the learning rate that is best for it;
* large: the large batch, all else the same;
* rate: its learning rate times the square root of the ratio of batches
  (equation 7), gradients clipped to norm 5 (the authors' programs);
* ghost: normalized in virtual batches;
* adapted: as many updates as the small batch has.

And two that the paper has not: 'large_tuned' and 'ghost_tuned' are 'rate' and
'ghost' with a learning rate of their own. What a gap is depends on which large
batch it is measured from: the paper's is not tuned.

Nothing is chosen by test images. The learning rate of 'small', the size of
virtual batches, then the rates of the tuned arms, are those of the best mean
accuracy of validation images over --tune_seeds; the test images are of --seeds.
Digits are split twice: --split_seed=0 of `experiments.ghost_batch_norm` once
was chosen by its test images, 1 was not, and both take the same choices here.

Every run is a line of --output as it ends, and is not repeated. Needs the extra
'images'.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
import platform
import shlex
import sys

from absl import app
from absl import flags
import flax
import jax
import numpy as np
import tqdm

from experiments import ghost_batch_norm_runs as runs
from experiments.ghost_batch_norm_records import share_of

_OUTPUT = flags.DEFINE_string(
  'output',
  str(
    pathlib.Path(__file__).parent
    / 'benchmarks'
    / 'results'
    / 'ghost_batch_norm_recipe.jsonl'
  ),
  'Records, JSON lines.',
)
_TUNE_SEEDS = flags.DEFINE_list('tune_seeds', ['100', '101', '102'], 'To tune.')
_SEEDS = flags.DEFINE_list('seeds', list('0123456789'), 'To report.')
_ARMS = flags.DEFINE_list('arms', None, 'To report; all by default.')

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


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  try:
    tune_seeds, seeds = (
      [int(s) for s in flag.value] for flag in (_TUNE_SEEDS, _SEEDS)
    )
  except ValueError as e:
    sys.exit(f'ghost_batch_norm_recipe: {e}')
  known = list(arms(runs.Setting(), 16))
  names = _ARMS.value or known
  if unknown := set(names) - set(known):
    sys.exit(f'--arms={",".join(unknown)} unknown; known: {", ".join(known)}')
  if set(tune_seeds) & set(seeds) or len(seeds) < 2:
    sys.exit('--seeds are two at least, and none of --tune_seeds')
  about = dict(
    command=shlex.join(
      ['python', '-m', 'experiments.ghost_batch_norm_recipe', *sys.argv[1:]]
    ),
    python=platform.python_version(),
    jax=jax.__version__,
    flax=flax.__version__,
    numpy=np.__version__,
  )
  path = pathlib.Path(_OUTPUT.value)
  lines = []
  for name, setting in tqdm.tqdm(SETTINGS.items(), unit='split'):
    found = Runs(path, name, setting, about)
    lines += [f'### {name}', '', *report(found, tune_seeds, seeds, names), '']
  print('\n'.join(lines))


if __name__ == '__main__':
  app.run(main)
