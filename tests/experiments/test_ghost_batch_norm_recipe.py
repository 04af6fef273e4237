"""What the recipe's table says is chosen by validation images alone."""

from experiments import ghost_batch_norm_arms as recipe
from experiments import ghost_batch_norm_runs as runs

_SETTING = runs.Setting(small_batch=32, large_batch=512, epochs=40)
_TUNE, _SEEDS = [8, 9], [0, 1, 2]


class _Fake:
  """Trains nothing: validation likes rate 0.2 and 32, the test opposes it."""

  def __init__(self):
    self.asked = []

  def __call__(self, setting):
    def train(arm, rate, seed):
      self.asked.append((arm, rate, seed))
      worse = abs(rate - 0.2) + (arm.ghost_size not in (None, 32))
      test = 0.9 if arm.batch == 32 else 0.5 if not arm.ghost_size else 0.7
      test += 0.01 * seed + 0.1 * worse
      return dict(valid_accuracy=1 - worse, test_accuracy=test)

    return train


def _found(path, make):
  return recipe.Runs(path, 'x', _SETTING, dict(jax='1'), make=make)


def test_choices_are_of_validation(tmp_path):
  size, rates = recipe.choose(_found(tmp_path / 'x', _Fake()), _TUNE)
  assert size == 32
  assert set(rates.values()) == {0.2}


def test_arms_are_the_papers():
  of = recipe.arms(_SETTING, 16)
  assert of['large'].rate_factor == 1 and of['rate'].rate_factor == 4
  assert of['rate'].clip_norm == 5 and of['large'].clip_norm is None
  assert of['adapted'].epochs == 640 and of['ghost'].epochs == 40
  assert of['ghost'].ghost_size == 16 and of['rate'].ghost_size is None


def test_report_has_shares_and_repeats_no_run(tmp_path):
  first, again = _Fake(), _Fake()
  names = list(recipe.arms(_SETTING, 16))
  report = lambda make: list(
    recipe.report(_found(tmp_path / 'x', make), _TUNE, _SEEDS, names)
  )
  lines = report(first)
  assert '| small | 32 | - | 40 | 0.2 | 91.00 ± 1.00 |' in lines
  assert any(
    l.startswith('ghost closes 50% of the gap of large') for l in lines
  )
  assert report(again) == lines and not again.asked
