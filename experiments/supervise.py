r"""Trains on several processes, and goes on without those that fail.

python -m experiments.supervise --config=byte_stdlib_tiny --workdir=runs/e \
    --num_processes=4 --devices_per_process=2 --mesh=data=4,tensor=2

Starts `experiments.train_lm` in each process. One that dies, hangs, or holds
other parameters than its replicas is expelled, and training goes on from the
last checkpoint, or with --snapshot_every=1 from the last step, on the largest
mesh that is left, with the same global batch; later it grows back.
`supervise.jsonl` says what happened when.

SIGTERM and SIGINT are passed on: the trainers save and end. A second one ends
them at once. If the supervisor is killed its trainers are, too.

Exit codes (experiments/elastic/exit_codes.py): 0 finished; 1 gave up after too
many failures; 2 wrong arguments; 3 the same step was not finite twice; 4 too
few processes are left; 75 stopped by a signal, the same command goes on.
"""

import dataclasses
import json
import pathlib
import signal
import sys
import time

from absl import app
from absl import flags

from experiments import configs
from experiments.elastic import actions
from experiments.elastic import exit_codes
from experiments.elastic.health import Health
from experiments.elastic.keepers import Keepers
from experiments.elastic.policy import Limits
from experiments.elastic.policy import Policy
from experiments.elastic.trainers import Trainers
from experiments.elastic.vitals import Patience

_CONFIG = flags.DEFINE_string('config', None, 'See train_lm.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'See train_lm.')
_OVERRIDE = flags.DEFINE_multi_string('override', [], 'See train_lm.')
_STEPS = flags.DEFINE_integer('steps', None, 'See train_lm.')
_RULES = flags.DEFINE_string('rules', None, 'See train_lm.')
_MESH = flags.DEFINE_string(
  'mesh', None, "The whole mesh, without -1, instead of the config's."
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 2, 'At most.')
_DEVICES = flags.DEFINE_integer(
  'devices_per_process', 1, 'CPU devices that each process simulates.'
)
_TRAINER = flags.DEFINE_string(
  'trainer',
  'experiments.train_lm',
  'Module, or path of a .py file, that takes the flags of train_lm.',
)
_FINGERPRINT_EVERY = flags.DEFINE_integer(
  'fingerprint_every', 1, 'Steps between comparisons of the parameters.'
)
_SNAPSHOT_EVERY = flags.DEFINE_integer(
  'snapshot_every',
  None,
  'Steps between snapshots in memory; none by default.',
)
_PARITY = flags.DEFINE_integer(
  'num_parity', 1, 'How many keepers of snapshots may be lost.'
)
_HEALTH = flags.DEFINE_string(
  'health_command',
  None,
  'Shell command that succeeds if lost process {slot} can be used again.',
)
_POLL_S = flags.DEFINE_float('poll_s', 0.1, 'Seconds between two looks.')
_LIMITS = {
  field.name: flags.DEFINE_float(field.name, field.default, 'See Limits.')
  for field in dataclasses.fields(Limits)
  if field.name != 'max_restarts'
}
_MAX_RESTARTS = flags.DEFINE_integer('max_restarts', 10, 'See Limits.')
_PATIENCE = {
  field.name: flags.DEFINE_float(field.name, field.default, 'See Patience.')
  for field in dataclasses.fields(Patience)
}


class Supervisor:
  """Sees for the policy, and does what it says.

  Args:
    policy: What to do when.
    trainers: Processes.
    keepers: Of snapshots, or `None`.
    health: Asks lost slots.
    events: File to append a JSON line for every action to.
    say: Prints a line.
  """

  def __init__(self, policy, trainers, keepers, health, events, say):
    self._policy, self._trainers = policy, trainers
    self._keepers, self._health = keepers, health
    self._events, self._say = events, say
    self._signals = 0
    self._status = ''

  def run(self, poll_s: float) -> int:
    """Returns the exit code."""
    old = {
      s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)
    }
    try:
      while True:
        for action in self._policy.observe(self._look()):
          self._do(action)
          if isinstance(action, actions.Finish):
            return action.code
        if self._signals > 1:
          self._say('supervise: a second signal, trainers are killed')
          return exit_codes.STOPPED
        self._show()
        time.sleep(poll_s)
    finally:
      self._trainers.kill()
      self._health.close()
      if self._keepers:
        self._keepers.close()
      for number, handler in old.items():
        signal.signal(number, handler)

  def _handle(self, number, frame):
    del number, frame
    self._signals += 1

  def _look(self):
    if self._keepers:
      self._keepers.revive()
    exits = self._trainers.exits()  # First: the last beat is before the end.
    return actions.Observation(
      time_s=time.monotonic(),
      exits=exits,
      beats=self._trainers.beats(),
      saved_step=self._trainers.saved_step(),
      healthy=self._health.ask(self._policy.lost),
      stop=self._signals > 0,
    )

  def _do(self, action):
    more = {}
    match action:
      case actions.Start():
        keepers = self._keepers
        tier = keepers.arguments(action.slots) if keepers else ()
        self._trainers.start(action, tier)
        more = dict(pids=self._trainers.pids())
      case actions.Stop():
        self._trainers.terminate()
      case actions.Kill():
        self._trainers.kill()
      case actions.Discard():
        more = dict(steps=self._trainers.discard(action.after_step))
        if self._keepers:  # They cannot forget some steps only.
          self._keepers.forget()
      case actions.Finish():
        self._trainers.kill()
    self._note(action, more)

  def _note(self, action, more):
    event = type(action).__name__.lower()
    values = {**dataclasses.asdict(action), **more}
    with self._events.open('a', encoding='utf-8') as file:
      line = {'time': time.time(), 'event': event, **values}
      file.write(json.dumps(line) + '\n')
    text = ', '.join(f'{k}={v}' for k, v in values.items() if k != 'pids')
    self._say(f'supervise: {event}: {text}')

  def _show(self):
    """One line that is written over, where somebody looks."""
    if sys.stderr.isatty():
      self._status = f'supervise: {self._policy.describe()}'
      print(f'\r\x1b[K{self._status}', end='', file=sys.stderr, flush=True)


def _say(line):
  clear = '\r\x1b[K' if sys.stderr.isatty() else ''
  # One write: lines of several threads do not mix.
  sys.stderr.write(f'{clear}{line}\n')
  sys.stderr.flush()


def _arguments():
  """Flags that are passed on as they are."""
  given = [f'--config={_CONFIG.value}']
  for flag in (_STEPS, _RULES):
    if flag.value is not None:
      given.append(f'--{flag.name}={flag.value}')
  given.append(f'--fingerprint_every={_FINGERPRINT_EVERY.value}')
  return [*given, *(f'--override={o}' for o in _OVERRIDE.value)]


def _supervisor():
  if not _CONFIG.value or not _WORKDIR.value:
    raise ValueError('give --config= and --workdir=')
  config = configs.load(_CONFIG.value, _OVERRIDE.value)
  workdir = pathlib.Path(_WORKDIR.value)
  accumulation = config.get('accumulation', 1)
  policy = Policy(
    config.get('mesh', '') if _MESH.value is None else _MESH.value,
    num_slots=_NUM_PROCESSES.value,
    devices_per_slot=_DEVICES.value,
    batch_size=config['batch_size'],
    accumulation=accumulation,
    limits=Limits(
      max_restarts=_MAX_RESTARTS.value,
      **{name: flag.value for name, flag in _LIMITS.items()},
    ),
    patience=Patience(**{name: f.value for name, f in _PATIENCE.items()}),
  )
  trainers = Trainers(
    workdir,
    _arguments(),
    devices_per_process=_DEVICES.value,
    accumulation=accumulation,
    trainer=_TRAINER.value,
    say=_say,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  keepers = None
  if _SNAPSHOT_EVERY.value is not None:
    keepers = Keepers(
      _NUM_PROCESSES.value,
      num_parity=_PARITY.value,
      snapshot_every=_SNAPSHOT_EVERY.value,
      say=_say,
    )
  events = workdir / 'supervise.jsonl'
  health = Health(_HEALTH.value)
  return Supervisor(policy, trainers, keepers, health, events, _say)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  try:
    supervisor = _supervisor()
  except (ValueError, OSError, RuntimeError) as e:
    print(f'supervise: {e}', file=sys.stderr)
    sys.exit(exit_codes.WRONG)
  sys.exit(supervisor.run(_POLL_S.value))


if __name__ == '__main__':
  app.run(main)
