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
from experiments.ghost_batch_norm_arms import SETTINGS
from experiments.ghost_batch_norm_arms import Runs
from experiments.ghost_batch_norm_arms import arms
from experiments.ghost_batch_norm_arms import report

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
