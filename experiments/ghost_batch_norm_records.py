"""Records of `experiments.ghost_batch_norm`: kept, compared, shown.

Of each arm as many learning rates are tried, on validation images and on seeds
of their own; the best one then runs on the seeds that are reported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import json
import pathlib

import numpy as np

from experiments.ghost_batch_norm_runs import ARMS
from experiments.ghost_batch_norm_runs import Key
from experiments.ghost_batch_norm_runs import Results
from experiments.ghost_batch_norm_runs import Setting

_NUM_RESAMPLES = 10_000


class Records:
  """Runs of a setting in a file of JSON lines, which may hold others.

  Args:
    path: The file; made when the first run is kept.
    setting: Whose runs these are.
    about: More to write of each run, such as versions.
  """

  def __init__(self, path: pathlib.Path, setting: Setting, about: dict):
    self._path, self._about = path, about
    # As it is read back: tuples are lists.
    self._setting = json.loads(json.dumps(dataclasses.asdict(setting)))
    self._found = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
        if record['setting'] == self._setting:
          key = record['arm'], record['rate'], record['seed']
          self._found[key] = record
      except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(
          f'{path}, line {number} is not a record ({e!r}); remove it'
        ) from e

  def get(
    self, keys: Iterable[Key], run: Callable[[Iterable[Key]], Results]
  ) -> Iterator[dict]:
    """Records of `keys`: first those that are there, then those `run` makes."""
    missing = []
    for key in keys:
      if key in self._found:
        yield self._found[key]
      else:
        missing.append(key)
    for key, result in run(missing):
      names = dict(zip(('arm', 'rate', 'seed'), key, strict=True))
      record = names | result | dict(setting=self._setting) | self._about
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with self._path.open('a') as f:
        f.write(json.dumps(record) + '\n')
      self._found[key] = record
      yield record


def compare(
  records: Records,
  run: Callable[[Iterable[Key]], Results],
  rates: Sequence[float],
  tune_seeds: Sequence[int],
  seeds: Sequence[int],
) -> Iterator[dict]:
  """Chooses each arm's learning rate, then runs it on `seeds`.

  Yields:
    The record of every run; those of `seeds` come last.

  Raises:
    ValueError: No rate or seed, one twice, a rate that is not positive, or a
      seed that is in both.
  """
  given = dict(rates=rates, tune_seeds=tune_seeds, seeds=seeds)
  for name, values in given.items():
    if not values or len(set(values)) < len(values):
      raise ValueError(f'{name}={list(values)} is empty, or has one twice')
  if min(rates) <= 0:
    raise ValueError(f'rates={list(rates)} are not all positive')
  if both := set(tune_seeds) & set(seeds):
    raise ValueError(f'seeds {sorted(both)} would be tuned on and reported')
  found = []
  keys = [(arm, r, s) for arm in ARMS for r in rates for s in tune_seeds]
  for record in records.get(keys, run):
    found.append(record)
    yield record
  best = {arm: best_rate(found, arm) for arm in ARMS}
  keys = [(arm, best[arm], s) for s in seeds for arm in ARMS]
  yield from records.get(keys, run)


def best_rate(records: Sequence[dict], arm: str) -> float:
  """The rate of the best mean validation accuracy; of equal ones the least."""
  valid = {}
  for r in records:
    if r['arm'] == arm:
      valid.setdefault(r['rate'], []).append(r['valid_accuracy'])
  return max(sorted(valid), key=lambda rate: np.mean(valid[rate]))


def by_arm(records: Iterable[dict], what: str = 'test_accuracy') -> dict:
  """Arm to values `[seeds]`, seed by seed the same for every arm."""
  records = sorted(records, key=lambda r: r['seed'])
  return {
    a: np.array([r[what] for r in records if r['arm'] == a]) for a in ARMS
  }


def share_closed(accuracy: dict) -> tuple[float, float, float]:
  """Share of the gap of the large batch that ghosts close, and its 90%.

  Args:
    accuracy: What `by_arm` returns.
  """
  return share_of(*(accuracy[arm] for arm in ARMS))


def share_of(
  small: np.ndarray, large: np.ndarray, ours: np.ndarray
) -> tuple[float, float, float]:
  """Share of the gap between two arms that a third one closes, and its 90%.

  Args:
    small: Accuracies `[seeds]`, seed by seed the same for every arm.
    large: Of the arm with the gap.
    ours: Of what is to close it.

  Returns:
    (ours - large) / (small - large) of the means, and the 5th and 95th
    percentile of the same over seeds drawn anew with replacement (bootstrap);
    NaN where a gap is not positive.
  """
  n = len(small)
  draws = np.random.default_rng(0).integers(0, n, (_NUM_RESAMPLES, n))
  shares = []
  for index in (np.arange(n)[None], draws):
    gap = (small - large)[index].mean(1)
    closed = (ours - large)[index].mean(1)
    shares.append(np.where(gap > 0, closed / np.where(gap > 0, gap, 1), np.nan))
  low, high = np.percentile(shares[1], (5, 95))
  return float(shares[0][0]), float(low), float(high)


def table(records: Sequence[dict], setting: Setting) -> str:
  """Markdown: each arm's accuracies, the gap, and the share closed."""
  test, train = by_arm(records), by_arm(records, 'train_accuracy')
  rates = {r['arm']: r['rate'] for r in records}
  lines = [
    '| arm | batch | virtual | learning rate | test accuracy, % | train, % |',
    '|---|---|---|---|---|---|',
  ]
  for arm in ARMS:
    ghost = setting.ghost_size if arm == 'ghost' else '-'
    rate = setting.learning_rate(arm, rates[arm])
    lines.append(
      f'| {arm} | {setting.batch(arm)} | {ghost} | {rate:.3g} '
      f'| {_spread(test[arm])} | {_spread(train[arm])} |'
    )
  share, low, high = share_closed(test)
  return '\n'.join(
    [
      *lines,
      '',
      f'{len(test["small"])} seeds, mean and standard deviation. Gap (small - '
      f'large): {_spread(test["small"] - test["large"])} points; closed by '
      f'ghosts: {_spread(test["ghost"] - test["large"])} points, a share of '
      f'{share:.0%} (90% of resampled seeds: {low:.0%} to {high:.0%}).',
    ]
  )


def _spread(values):
  std = np.std(values, ddof=1) if len(values) > 1 else float('nan')
  return f'{100 * np.mean(values):.2f} ± {100 * std:.2f}'


def draw(records: Sequence[dict], setting: Setting, path: pathlib.Path) -> None:
  """Test accuracy of every seed, one line each, and means with deviations."""
  import matplotlib.figure

  test = by_arm(records)
  figure = matplotlib.figure.Figure((5.5, 4), layout='constrained')
  axis = figure.subplots()
  at = np.arange(len(ARMS))
  for values in zip(*(100 * test[arm] for arm in ARMS), strict=True):
    axis.plot(at, values, color='0.75', marker='.', linewidth=0.7, zorder=1)
  means = [100 * test[arm].mean() for arm in ARMS]
  stds = [100 * test[arm].std(ddof=min(1, len(test[arm]) - 1)) for arm in ARMS]
  axis.errorbar(at, means, stds, fmt='o', color='C0', capsize=5, zorder=2)
  labels = [f'batch {setting.batch(arm)}' for arm in ARMS]
  labels[-1] += f'\nvirtual {setting.ghost_size}'
  axis.set_xticks(at, labels)
  axis.set_xlim(-0.4, len(ARMS) - 0.6)
  axis.set_ylabel('test accuracy, %')
  axis.set_title(
    f'{setting.images}, {setting.num_train} images, {setting.epochs} epochs: '
    f'{share_closed(test)[0]:.0%} of the gap closed',
    fontsize=10,
  )
  axis.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)
