r"""Compiles the GPU kernels for an H200, without one, and says what ptxas made.

python -m experiments.benchmarks.gpu_kernels --markdown

Each row of `tune_gpu_rows` with the kernel's own block sizes: registers and
spills of a thread, and of the main loop, for one pass of one warpgroup: cycles
of the SM's tensor cores, instructions that a partition issues, cycles of its
exponentials. The greatest of the three bounds the loop; `tensor_share` is what
is left for the tensor cores if all is hidden that can be. Time is not measured.
`gpu.sh` does, where there is a GPU.

A kernel whose WGMMAs ptxas serialises is an error.
"""

import functools
import json
import pathlib
import sys

from absl import app
from absl import flags
import jax
import tqdm

from experiments.benchmarks import tune_gpu_rows
from pallas_kernels import gpu_compiler
from pallas_kernels.common import dispatch

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'gpu_kernels.json'
_ROWS = flags.DEFINE_string('rows', '', 'Only rows whose name contains this.')
_OUT = flags.DEFINE_string('out', str(_RESULTS), 'Where the results go.')
_MARKDOWN = flags.DEFINE_bool(
  'markdown', False, 'Prints the table of the results that are there.'
)
_FIELDS = (
  'registers',
  'spill_bytes',
  'tensor_cycles',
  'issue_cycles',
  'mufu_cycles',
  'tensor_share',
)


def compile_row(row: tune_gpu_rows.Row) -> list[dict]:
  """What the compiler says of each kernel of a row.

  Raises:
    RuntimeError: ptxas has serialised WGMMAs.
  """
  f = dispatch.load(row.op, 'pallas_gpu', row.function)
  args = jax.eval_shape(row.make, jax.random.key(0))
  compiled = gpu_compiler.compile_for(functools.partial(f, **row.static), *args)
  return [describe(kernel) for kernel in compiled.kernels]


def describe(kernel: gpu_compiler.Kernel) -> dict:
  """One line of the table."""
  serialised = [w for w in kernel.warnings if 'serialized' in w]
  if serialised:
    raise RuntimeError(f'{kernel.name}: {serialised[0]}')
  loop = kernel.main_loop
  return dict(
    kernel=kernel.name.removesuffix('_mosaic_gpu_kernel'),
    registers=kernel.registers,
    spill_bytes=kernel.spill_bytes,
    spills_in_loop=loop.counts['LDL'] + loop.counts['STL'],
    tensor_cycles=loop.tensor_cycles,
    issue_cycles=loop.issue_cycles,
    mufu_cycles=loop.mufu_cycles,
    tensor_share=round(loop.tensor_share, 3),
  )


def markdown(results: dict) -> str:
  """The table, one line a kernel."""
  head = ['row', 'kernel', *(name.replace('_', ' ') for name in _FIELDS)]
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for row, kernels in results['rows'].items():
    for kernel in kernels:
      cells = [row, kernel['kernel'], *(str(kernel[f]) for f in _FIELDS)]
      lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  path = pathlib.Path(_OUT.value)
  if _MARKDOWN.value:
    if not path.exists():
      raise app.UsageError(f'{path} is not there; run without --markdown first')
    print(markdown(json.loads(path.read_text())))
    return
  rows = {n: r for n, r in tune_gpu_rows.ROWS.items() if _ROWS.value in n}
  if not rows:
    names = '; '.join(tune_gpu_rows.ROWS)
    raise app.UsageError(f'no row contains {_ROWS.value!r}: {names}')
  results = {'chip': 'h200', 'jax': jax.__version__, 'rows': {}}
  for name, row in tqdm.tqdm(rows.items(), unit='row', file=sys.stderr):
    results['rows'][name] = compile_row(row)
    # Kept after each row.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + '\n')
  print(markdown(results))


if __name__ == '__main__':
  app.run(main)
