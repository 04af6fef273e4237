r"""The kernels on one Hopper GPU: right, and how fast, against others.

experiments/benchmarks/gpu.sh                     # all of it, in 8 minutes
python -m experiments.benchmarks.gpu attention --budget_s=60
python -m experiments.benchmarks.gpu attention --platform=cpu --smoke

A section a process. Rows go into OUT/gpu_NAME.json as they are found; a section
that is started again goes on where it stopped. `machine` says what is here and
what is missing, `report` prints all that was found, draws it, and fails if a
check did. argparse, and as little else as possible: it is to run where only JAX
and NumPy are.
"""

import argparse
import importlib
import os
import pathlib
import platform
import subprocess
import sys

from experiments.benchmarks import gpu_record
from experiments.benchmarks import gpu_report

# Name to module and function.
SECTIONS = {
  'checks': ('gpu_checks', 'run'),
  'peaks': ('gpu_peaks', 'run'),
  'attention': ('gpu_attention', 'run'),
  'paged': ('gpu_paged', 'run'),
  'grouped': ('gpu_matmuls', 'grouped'),
  'quantized': ('gpu_matmuls', 'quantized'),
  'loss': ('gpu_loss_norm', 'loss'),
  'norm': ('gpu_loss_norm', 'norm'),
  'engine': ('gpu_engine', 'run'),
  'sanitizer': ('gpu_sanitizer', 'run'),
  'pytest': ('gpu_pytest', 'run'),
}
_OTHERS = ('machine', 'report', 'note')
_RESULTS = pathlib.Path(__file__).parent / 'results'
# Modules that something here uses, and what for.
_USES = {
  'jaxtyping': 'annotations of the ops; a stand-in that checks nothing does',
  'flax': 'the engine',
  'torch': "PyTorch's attention and products",
  'flash_attn': 'its attention',
  'matplotlib': 'the picture',
  'pytest': "the repository's tests",
  'hypothesis': "the repository's tests",
  'beartype': "the repository's tests",
  'absl': "the repository's tests",
}


def main(argv: list[str]) -> int:
  """Runs one section, or another command."""
  args = _parser().parse_args(argv)
  record = gpu_record.Record(pathlib.Path(args.out) / f'gpu_{args.name}.json')
  if args.section == 'report':
    return _report(record, args)
  if args.section == 'note':
    record.set_section(
      args.of, status=args.status, seconds=round(args.seconds, 1)
    )
    return 0
  # Before JAX is there. The CPU computes some references.
  os.environ['JAX_PLATFORMS'] = dict(cuda='cuda,cpu').get(
    args.platform, args.platform
  )
  if args.section == 'machine':
    return _machine(record)
  module, function = SECTIONS[args.section]
  section = gpu_record.Section(
    record,
    args.section,
    budget_s=args.budget_s,
    hang_s=args.hang_s or max(30.0, 0.5 * args.budget_s),
    implementation='pallas_gpu' if args.platform == 'cuda' else 'xla',
    smoke=args.smoke,
  )
  try:
    module = importlib.import_module(f'experiments.benchmarks.{module}')
  except ModuleNotFoundError as e:
    section.add('all', 'ours', skipped=f'needs {e.name}')
    return 0
  getattr(module, function)(section)
  return 0


def _parser():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('section', choices=[*SECTIONS, *_OTHERS])
  add('--out', default=str(_RESULTS), help='Folder of the results.')
  add('--name', default='h200', help='Results are OUT/gpu_NAME.json.')
  add('--budget_s', type=float, default=60.0, help='Seconds to work for.')
  add('--hang_s', type=float, help='Of one contender; half the budget.')
  add('--platform', choices=('cuda', 'cpu'), default='cuda')
  add('--smoke', action='store_true', help='Tiny shapes.')
  add('--of', help='note: of which section.')
  add('--status', default='done', help='note: how it ended.')
  add('--seconds', type=float, default=0.0, help='note: how long it took.')
  return parser


def _machine(record):
  """Notes what is here; fails if JAX does not find its device."""
  import jax

  device = jax.devices()[0]
  missing = []
  for name, use in _USES.items():
    try:
      importlib.import_module(name)
    except ImportError:
      missing.append(name)
      print(f'missing: {name}: {use}')
  found = dict(
    device=device.device_kind,
    capability=str(getattr(device, 'compute_capability', '')),
    jax=jax.__version__,
    python=platform.python_version(),
    driver=_nvidia_smi(),
    missing=', '.join(missing) or 'nothing',
  )
  if 'torch' not in missing:
    import torch

    found['torch'] = torch.__version__
  record.update(machine=found)
  for name, value in found.items():
    print(f'{name}: {value}')
  return 0


def _nvidia_smi():
  fields = 'driver_version,clocks.max.sm,power.limit,memory.total'
  try:
    done = subprocess.run(
      ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader'],
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return 'unknown'
  return done.stdout.strip().splitlines()[0] if done.stdout else 'unknown'


def _report(record, args):
  content = record.read()
  print(gpu_report.table(content))
  picture = pathlib.Path(args.out) / f'gpu_{args.name}.png'
  if not gpu_report.draw(content, picture):
    print('no picture: no matplotlib, or nothing to draw')
  return int(any(gpu_report.problems(content)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
