r"""Finds block sizes for TPU kernels by the compiler's schedule, without a TPU.

python -m experiments.benchmarks.tune --rows='attention forward' --chips=v6e

Compiles our kernel of the rows of `tpu_rows` with every configuration that it
proposes, for every chip, and writes the fastest into the `tuned.json` beside
the kernel, where it is looked up when the kernel is traced. Each one found is
kept at once; a second run does only what is missing, unless --redo.
"""

import functools
import importlib
import pathlib
import sys

from absl import app
from absl import flags
import tqdm

from experiments.benchmarks import tpu_rows
from experiments.benchmarks import tuned_json
from pallas_kernels import tpu_compiler

_ROWS = flags.DEFINE_string('rows', '', 'Only rows whose name contains this.')
_CHIPS = flags.DEFINE_list(
  'chips', ['v4', 'v5e', 'v5p', 'v6e', 'tpu7x'], 'Chips to tune for.'
)
_REDO = flags.DEFINE_bool('redo', False, 'Also what tuned.json has already.')

_REFUSALS = (tpu_compiler.CompileError, NotImplementedError)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  rows = {n: f for n, f in tpu_rows.ROWS.items() if _ROWS.value in n}
  if not rows:
    raise app.UsageError(
      f'no row contains {_ROWS.value!r}: {"; ".join(tpu_rows.ROWS)}'
    )
  for name, make in rows.items():
    for chip in _CHIPS.value:
      tune(name, make(), chip)


def tune(name: str, row: tpu_rows.Row, chip: str) -> None:
  """Times the candidates of one row on one chip and keeps the best."""
  fn, args = row.contenders['ours'](chip)
  module = importlib.import_module(fn.func.__module__)
  function = fn.func.__name__
  prefix = 'backward_' if function.endswith('_backward') else ''
  features = getattr(module, f'{prefix}features')(*args, **fn.keywords)
  path = pathlib.Path(module.__file__).parent / 'tuned.json'
  known = tuned_json.find(path, function, chip, features)
  if known is not None and not _REDO.value:
    return
  candidates = getattr(module, f'{prefix}candidates')(
    chip, *args, **fn.keywords
  )
  best = None
  for config in tqdm.tqdm(candidates, f'{name}, {chip}', file=sys.stderr):
    cycles = _cycles(functools.partial(fn, config=config), args, row, chip)
    print(f'{name}, {chip}: {config} {cycles}', flush=True)
    if cycles is not None and (best is None or cycles < best['cycles']):
      best = dict(chip=chip, features=features, config=config, cycles=cycles)
  if best is None:
    raise ValueError(f'{name}: none of {candidates} compiles for {chip}')
  tuned_json.keep(path, function, best)


def _cycles(fn, args, row, chip):
  """Cycles of the row's kernels; `None` where they do not compile."""
  try:
    compiled = tpu_compiler.compile_for(
      fn, *args, topology=chip, flags=tpu_rows.FLAGS
    )
  except _REFUSALS:
    return None
  kernels = filter(row.kernels, compiled.kernels)
  return round(sum(compiled.schedule(name).cycles for name in kernels))


if __name__ == '__main__':
  app.run(main)
