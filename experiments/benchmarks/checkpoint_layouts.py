r"""Saved on any mesh, restored on any other: all pairs, with the next losses.

python -m experiments.benchmarks.checkpoint_layouts

After Lian et al., "Universal Checkpointing", https://arxiv.org/abs/2406.18820,
whose figures compare loss curves across a change of layout. On each layout a
tiny mixture of experts makes two steps, saves, and makes two more. Each of
these checkpoints is then restored on every layout: by `CheckpointManager`, and
by `convert.restore`, which reads rectangles. All of the state must be what was
saved, bit for bit, on the shards of the layout; and the two next losses those
of the run that went on where it was. (They are not the same bits: layouts add
up in another order.) The first of them depends on the parameters alone, the
second on the moments too.

Prints what it does, writes JSON to --output and a picture beside it. Four
minutes of CPU time, half of it to compile a step for each layout.
"""

import json
import pathlib
import platform
import tempfile

from absl import app
from absl import flags
from absl import logging
import jax
import numpy as np

from experiments.benchmarks import checkpoint_layouts_runs as runs
from jaxtrain.sharding import simulate_devices

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'checkpoint_layouts.json'
_OUTPUT = flags.DEFINE_string('output', str(_RESULTS), 'JSON.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  simulate_devices(8)
  names = list(runs.LAYOUTS)
  with tempfile.TemporaryDirectory() as folder:
    layouts = {}
    for name in names:
      layouts[name] = runs.Layout(name, pathlib.Path(folder))
      layouts[name].train()
      print(f'{name}: losses {layouts[name].losses}', flush=True)
    records = []
    for source in names:
      for target in names:
        record = runs.pair(layouts[source], layouts[target])
        records.append(record)
      mine = records[-len(names) :]
      worst = max(r['difference'] for r in mine)
      print(f'{source} on {len(mine)} layouts: {worst:.1e}', flush=True)
  wrong = [
    r for r in records if not r['same_bits'] or r['difference'] > runs.TOLERANCE
  ]
  result = dict(
    command='python -m experiments.benchmarks.checkpoint_layouts',
    python=platform.python_version(),
    jax=jax.__version__,
    pairs=len(records),
    same_bits=sum(r['same_bits'] for r in records),
    largest_difference=max(r['difference'] for r in records),
    tolerance=runs.TOLERANCE,
    records=records,
  )
  path = pathlib.Path(_OUTPUT.value)
  path.write_text(json.dumps(result, indent=1) + '\n')
  _draw(names, records, path.with_suffix('.png'))
  if wrong:
    raise SystemExit(f'{len(wrong)} of {len(records)} pairs differ: {wrong}')


def _draw(names, records, path):
  """Differences of the losses, in units of what is allowed."""
  import matplotlib.figure

  grid = np.array([r['difference'] for r in records]).reshape(len(names), -1)
  figure = matplotlib.figure.Figure((8.5, 7.5), layout='constrained')
  axis = figure.subplots()
  image = axis.imshow(grid, cmap='Blues', vmin=0, vmax=runs.TOLERANCE)
  for i in range(len(names)):
    for j in range(len(names)):
      record = records[i * len(names) + j]
      text = f'{grid[i, j] * 1e7:.1f}' if record['same_bits'] else 'bits'
      axis.text(j, i, text, ha='center', va='center', fontsize=7)
  labels = [name or 'one device' for name in names]
  axis.set_xticks(range(len(names)), labels, rotation=45, ha='right')
  axis.set_yticks(range(len(names)), labels)
  axis.tick_params(labelsize=8)
  axis.set_xlabel('restored on')
  axis.set_ylabel('saved on')
  axis.set_title(
    'Relative difference of the next two losses, in 1e-7; state bit for bit',
    fontsize=10,
  )
  figure.colorbar(image, shrink=0.7)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  app.run(main)
