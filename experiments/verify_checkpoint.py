"""Says whether checkpoints are whole, byte by byte.

python -m experiments.verify_checkpoint --directory=runs/quickstart/checkpoints

Exits with 1 if one is damaged, and names the files and the arrays; with 2 if
there is none. No devices are used but the host's processor.
"""

import os
import sys

from absl import app
from absl import flags
from absl import logging
import jax
import tqdm

from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.checkpoints.manager import DamagedError

_DIRECTORY = flags.DEFINE_string(
  'directory', None, 'Folder of the checkpoints of a run.', required=True
)
_STEP = flags.DEFINE_integer(
  'step', None, 'Which checkpoint; all of them if not given.'
)


def verify(directory: str, step: int | None) -> int:
  """Verifies one checkpoint, or all; prints a line for each.

  Args:
    directory: Of the checkpoints.
    step: Which; `None` is all.

  Returns:
    0 if they are whole, 1 if one is damaged, 2 if there is none.
  """
  if not os.path.isdir(directory):
    print(f'{directory} is no folder')
    return 2
  code = 0
  with CheckpointManager(directory) as manager:
    steps = manager.all_steps() if step is None else [step]
    if not steps:
      print(f'no checkpoint in {directory}')
      return 2
    for one in steps:
      code = max(code, _verify(manager, one))
  return code


def _verify(manager, step):
  """Verifies one checkpoint; the exit code."""
  with tqdm.tqdm(
    desc=f'step {step}',
    total=manager.size_bytes(step),
    unit='B',
    unit_scale=True,
    disable=None,
  ) as bar:
    try:
      num_bytes = manager.verify(step, progress=bar.update)
    except DamagedError as e:
      bar.close()
      print(e)
      return 1
    except ValueError as e:  # There is no such checkpoint.
      bar.close()
      print(e)
      return 2
  if num_bytes:
    print(f'step {step} is whole: {num_bytes:,} bytes are what was written')
  else:
    print(
      f'step {step}: all files are there; it was saved without checksums, so '
      'their contents cannot be verified'
    )
  return 0


def main(argv):
  """Verifies what the flags say."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  jax.config.update('jax_platforms', 'cpu')
  sys.exit(verify(_DIRECTORY.value, _STEP.value))


if __name__ == '__main__':
  app.run(main)
