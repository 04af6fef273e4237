r"""Runs the schedulers on traces in the simulator, and judges them.

python -m experiments.benchmarks.schedulers --cases=stalls,clients

Prints a table per case of `scheduler_cases`, writes one JSON line per case and
contender to --output (in place of what it has of these cases), and draws the
first figure of each case beside it.

--fit times the real engine instead, with a small random model on this machine:
fits the costs of its steps, simulates the same requests with these costs, and
prints how far the simulated time is from the measured one.
"""

import json
import pathlib

from absl import app
from absl import flags

from experiments.benchmarks import scheduler_cases
from experiments.benchmarks.scheduler_runs import run_case
from experiments.benchmarks.scheduler_runs import short

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'schedulers.jsonl'
_CASES = flags.DEFINE_list('cases', [], 'Only these; all by default.')
_SCALE = flags.DEFINE_float('scale', 1.0, 'Multiplies the requests of a trace.')
_FIT = flags.DEFINE_bool('fit', False, 'Time the real engine instead.')
_OUTPUT = flags.DEFINE_string('output', str(_RESULTS), 'JSON lines.')
_PICTURE = flags.DEFINE_bool('picture', True, 'Also draw OUTPUT as .png.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if _FIT.value:
    from experiments.benchmarks import scheduler_fit

    scheduler_fit.report()
    return
  cases = scheduler_cases.CASES
  unknown = set(_CASES.value) - set(cases)
  if unknown:
    raise app.UsageError(
      f'unknown cases {sorted(unknown)}; known: {", ".join(cases)}'
    )
  path = pathlib.Path(_OUTPUT.value)
  known = path.read_text().splitlines() if path.exists() else []
  by_case = {}
  for record in map(json.loads, known):
    by_case.setdefault(record['case'], []).append(record)
  for name in _CASES.value or cases:
    by_case[name] = run_case(name, cases[name](_SCALE.value))
  records = [r for name in cases for r in by_case.get(name, ())]
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  if _PICTURE.value:
    _draw(records, path.with_suffix('.png'))


def _draw(records, path):
  import matplotlib.figure

  names = list(dict.fromkeys(r['case'] for r in records))
  rows = -(-len(names) // 2)
  figure = matplotlib.figure.Figure((11, 2.8 * rows), layout='constrained')
  axes = list(figure.subplots(rows, 2, squeeze=False).flat)
  for axis, name in zip(axes, names, strict=False):
    mine = [r for r in records if r['case'] == name]
    labels = [r['scheduler'] for r in mine]
    values = [r[r['drawn']] for r in mine]
    bars = axis.barh(labels, values, color='#4878a8')
    axis.bar_label(bars, fmt='%.3g', padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(f'{name}: {short(mine[0]["drawn"])}', fontsize=10)
    axis.tick_params(labelsize=8)
    axis.spines[['top', 'right']].set_visible(False)
  for axis in axes[len(names) :]:
    axis.set_visible(False)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  app.run(main)
