r"""Trains a language model as one config says, on one device or many hosts.

python -m experiments.train_lm --config=byte_stdlib_tiny --workdir=runs/tiny \
    --simulate_devices=8 --mesh=data=2,fsdp=2,tensor=2

The same command, given again, goes on from the last checkpoint. On several
hosts start it on each of them: TPU pods, SLURM and Open MPI are detected;
elsewhere --coordinator, --num_processes and --process_id say it. To go on
without those that fail, see `experiments.supervise`.

Exit codes: 0 finished, or stopped by a signal; 1 an error; and those of
experiments/elastic/exit_codes.py.
"""

import contextlib
import sys

from absl import app
from absl import flags
from absl import logging
import jax

from experiments import configs
from experiments import training
from experiments.elastic import exit_codes
from jaxtrain import distributed
from jaxtrain import loop
from jaxtrain.checkpoints.in_memory.snapshots import InMemorySnapshots
from jaxtrain.heartbeat import Heartbeat
from jaxtrain.sharding import simulate_devices

_CONFIG = flags.DEFINE_string(
  'config', None, 'Name in experiments/configs/, or path of a .py file.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for checkpoints and metrics.'
)
_OVERRIDE = flags.DEFINE_multi_string(
  'override', [], 'key=json, changes the config: optimizer.b2=0.99.'
)
_STEPS = flags.DEFINE_integer('steps', None, "Instead of the config's steps.")
_MESH = flags.DEFINE_string('mesh', None, "Instead of the config's mesh.")
_RULES = flags.DEFINE_string('rules', None, "Instead of the config's rules.")
_SIMULATE = flags.DEFINE_integer(
  'simulate_devices', None, 'Number of CPU devices to simulate, per process.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0, where none is detected.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes.'
)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this one.')
_HEARTBEAT = flags.DEFINE_string(
  'heartbeat', None, 'File for signs of life, see jaxtrain/heartbeat.py.'
)
_FINGERPRINT_EVERY = flags.DEFINE_integer(
  'fingerprint_every', 1, 'Steps between checksums in the signs of life.'
)
_KEEPERS = flags.DEFINE_list(
  'keepers',
  [],
  'host:port of processes that keep snapshots in memory, see '
  'jaxtrain/checkpoints/in_memory/snapshots.py.',
)
_PARITY = flags.DEFINE_integer(
  'num_parity', 1, 'How many of --keepers may be lost.'
)
_SNAPSHOT_EVERY = flags.DEFINE_integer(
  'snapshot_every', 1, 'Steps between snapshots, with --keepers.'
)

_EXIT_CODES = {
  ValueError: exit_codes.WRONG,
  loop.NonFiniteError: exit_codes.NON_FINITE,
}


def _heartbeat():
  if _HEARTBEAT.value is None:
    return None
  return Heartbeat(_HEARTBEAT.value, fingerprint_every=_FINGERPRINT_EVERY.value)


@contextlib.contextmanager
def _snapshots():
  """Arguments of the loop that snapshots need, if there are keepers."""
  if not _KEEPERS.value:
    yield {}
    return
  with InMemorySnapshots(_KEEPERS.value, _PARITY.value) as snapshots:
    yield dict(snapshots=snapshots, snapshot_every=_SNAPSHOT_EVERY.value)


def _from_flags():
  if not _CONFIG.value:
    raise ValueError(f'give --config=, one of {", ".join(configs.names())}')
  config = configs.load(_CONFIG.value, _OVERRIDE.value)
  for flag in (_STEPS, _MESH, _RULES):
    if flag.value is not None:
      config[flag.name] = flag.value
  configs.check(config, training.run, training.OPTIONS)
  return config


def _summary(result):
  mfu = '' if result.mfu is None else f', MFU {result.mfu:.1%}'
  evaluated = [h for h in result.history if 'eval_loss' in h]
  lines = [
    f'step {result.step}: {result.tokens_per_s:,.0f} tokens/s{mfu}, '
    f'{result.compile_s:.1f} s compiling {result.num_programs} programs'
  ]
  if evaluated:
    lines.append(f'held-out loss {evaluated[-1]["eval_loss"]:.4f} nats/token')
  if result.stopped_by not in (None, 'data'):
    lines.append(
      f'stopped by {result.stopped_by}; the same command goes on from here'
    )
  return '\n'.join(lines)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes.
  try:
    config = _from_flags()
    heartbeat = _heartbeat()  # First of all: joining the others may hang.
    if _SIMULATE.value:
      simulate_devices(_SIMULATE.value)
    distributed.initialize(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    with _snapshots() as tier:
      result = training.run(
        _WORKDIR.value, heartbeat=heartbeat, **tier, **config
      )
  except OSError as e:
    sys.exit(f'train_lm: {e}')
  except tuple(_EXIT_CODES) as e:
    print(f'train_lm: {e}', file=sys.stderr, flush=True)
    sys.exit(next(c for kind, c in _EXIT_CODES.items() if isinstance(e, kind)))
  if jax.process_index() == 0:
    print(_summary(result))


if __name__ == '__main__':
  app.run(main)
