"""Kills runs that save, damages what they saved, and looks what is left.

python -m experiments.benchmarks.checkpoint_kills --kills=100 --pairs=20

SIGKILL comes at a moment that is uniformly random over the time of a save, to a
run of one process, or to one or all processes of a run of two to four; then the
next run must resume from the newest checkpoint that was finished, or one that
is newer, with every leaf of that step. Truncated, flipped and deleted files,
and disks that fill up, must be named, and the checkpoint before resumed.

Processes are forked from one that has imported JAX and not started it, as
importing takes seconds and a save a tenth of one.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

from absl import app
from absl import flags
import jax
import tqdm

from experiments.benchmarks import checkpoint_kills_child as child_lib

_RESULTS = pathlib.Path(__file__).parent / 'results' / 'checkpoint_kills.json'
_TIMEOUT_S = 300
_DAMAGES = ('truncated', 'flipped', 'deleted')
# Of the longest kill after a save has begun, in times of a save before.
_LONGEST = 1.15

_KILLS = flags.DEFINE_integer('kills', 100, 'Kills of runs of one process.')
_PAIRS = flags.DEFINE_integer('pairs', 20, 'Kills of runs of 2, 3 and 4 each.')
_DAMAGED = flags.DEFINE_integer('damaged', 20, 'Damages of each kind.')
_FULL = flags.DEFINE_integer('full', 20, 'Disks that fill up.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of all that is random.')
_OUT = flags.DEFINE_string('out', str(_RESULTS), 'Where the results go.')


class Process:
  """A forked process that runs a function and says things on a pipe.

  Args:
    function: Called with a function that says things, and with `args`.
    devices: Number of simulated devices.
    index: Number of the process among `count`.
    count: How many join.
    address: Where they meet.
    args: More arguments of `function`.
  """

  def __init__(self, function, *args, devices=4, index=0, count=1, address=''):
    read, write = os.pipe()
    self._pid = os.fork()
    if self._pid == 0:
      os.close(read)
      _run(function, args, write, (devices, index, count, address))
    os.close(write)
    self._read, self._rest, self._is_over = read, b'', False

  def hear(self, timeout_s: float = _TIMEOUT_S) -> dict[str, Any] | None:
    """The next thing it says; `None` when it is dead or has nothing to say."""
    end = time.monotonic() + timeout_s
    while b'\n' not in self._rest:
      left = max(0.0, end - time.monotonic())
      if not select.select([self._read], [], [], left)[0]:
        raise TimeoutError(f'nothing heard for {timeout_s} s')
      if not (data := os.read(self._read, 1 << 16)):
        return None
      self._rest += data
    line, _, self._rest = self._rest.partition(b'\n')
    return json.loads(line)

  def kill(self) -> None:
    """Sends SIGKILL, if it is alive, without waiting."""
    if not self._is_over:
      os.kill(self._pid, signal.SIGKILL)

  def close(self) -> None:
    """Kills it and forgets it."""
    if not self._is_over:
      self.kill()
      os.waitpid(self._pid, 0)
      os.close(self._read)
      self._is_over = True


def _run(function, args, fd, join):
  """The life of a forked process; does not return."""
  say = child_lib.speaker(fd)
  # Coordination and gloo complain loudly about killed processes.
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 1)
  os.dup2(null, 2)
  try:
    child_lib.start(*join)
    function(say, *args)
  except BaseException:
    say({'error': traceback.format_exc()})
  finally:
    os._exit(0)


@contextlib.contextmanager
def run(count: int, function: Callable, *args) -> Iterator[list[Process]]:
  """The processes of a run; killed at the end, if they are not over."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  devices = 4 if count == 1 else 2
  started = [
    Process(
      function, *args, devices=devices, index=i, count=count, address=address
    )
    for i in range(count)
  ]
  try:
    yield started
  finally:
    for process in started:
      process.close()


def _expect(process: Process, key: str) -> dict[str, Any]:
  """The next thing said, which must have `key`."""
  said = process.hear()
  if said is None or key not in said:
    why = 'it died' if said is None else said.get('error', said)
    raise AssertionError(f'expected {key!r}: {why}')
  return said


class Killer:
  """Kills one run after the other in one folder.

  Args:
    folder: Of the checkpoints.
    count: Processes of a run.
    rng: Of moments and victims.
  """

  def __init__(self, folder: pathlib.Path, count: int, rng: random.Random):
    self._folder, self._count, self._rng = folder, count, rng
    self._finished = 0
    self.left: collections.Counter = collections.Counter()

  def trial(self) -> None:
    """Resumes what the last kill has left, saves, and is killed.

    Raises:
      AssertionError: What is left is not what it should be.
    """
    with run(self._count, child_lib.save_for_ever, self._folder) as processes:
      first = processes[0]
      self._check_resumed(processes)
      for _ in range(self._rng.randint(1, 2)):
        _expect(first, 'begin')
        said = _expect(first, 'end')
        self._finished = said['end']
      _expect(first, 'begin')
      time.sleep(self._rng.random() * _LONGEST * said['seconds'])
      self._kill(processes)
      while (said := first.hear()) is not None:  # What it said before.
        self._finished = max(self._finished, said.get('end', 0))
        if 'error' in said:
          # One that outlives another cannot go on.
          assert self._count > 1, said['error']
          self.left['survivor raised'] += 1
    self._note_what_is_left()

  def check(self) -> None:
    """Looks at what the last kill has left."""
    with run(self._count, child_lib.save_for_ever, self._folder) as processes:
      self._check_resumed(processes)

  def _check_resumed(self, processes):
    said = [_expect(p, 'resumed') for p in processes]
    assert all(s == said[0] for s in said), said
    step = said[0]['resumed']
    assert step >= self._finished, (
      f'step {self._finished} was finished, and {said[0]} is what is left'
    )
    self._finished = step

  def _kill(self, processes):
    """One of them, and the others soon after, or all at once."""
    if len(processes) > 1 and self._rng.random() < 0.5:
      self._rng.choice(processes).kill()
      time.sleep(self._rng.random() * 0.5)
    for process in processes:
      process.kill()

  def _note_what_is_left(self):
    names = [p.name for p in self._folder.iterdir()]
    if any('.orbax-checkpoint-tmp' in name for name in names):
      self.left['unfinished'] += 1
    elif any('.deleted' in name for name in names):
      self.left['half deleted'] += 1
    else:
      self.left['only whole ones'] += 1


def kills(
  count: int, trials: int, rng: random.Random, bar: tqdm.tqdm
) -> dict[str, Any]:
  """Results of so many kills of runs of `count` processes."""
  failures = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder) / 'checkpoints'
    killer = Killer(folder, count, rng)
    for i in range(trials):
      try:
        killer.trial()
      except (AssertionError, TimeoutError) as e:
        failures.append(f'trial {i}: {e}')
        left = killer.left
        shutil.rmtree(folder, ignore_errors=True)
        killer = Killer(folder, count, rng)
        killer.left = left
      bar.update()
    if trials:
      try:
        killer.check()
      except (AssertionError, TimeoutError) as e:
        failures.append(f'at the end: {e}')
  return dict(trials=trials, left=dict(killer.left), failures=failures)


def damages(
  kind: str, trials: int, seed: int, bar: tqdm.tqdm
) -> dict[str, Any]:
  """Results of so many damages of a kind."""
  failures, named = [], []
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder) / 'whole'
    with run(1, child_lib.save_some, whole, 3) as (process,):
      _expect(process, 'saved')
    for i in range(trials):
      broken = pathlib.Path(folder) / f'broken_{i}'
      shutil.copytree(whole, broken)
      args = (child_lib.resume_damaged, broken, kind, seed + i)
      with run(1, *args) as (process,):
        try:
          said = _expect(process, 'named')['named']
          named.append(said.replace(str(broken), '...'))
        except (AssertionError, TimeoutError) as e:
          failures.append(f'trial {i}: {e}')
      shutil.rmtree(broken)
      bar.update()
  return dict(trials=trials, failures=failures, examples=named[:3])


def full_disks(
  trials: int, rng: random.Random, bar: tqdm.tqdm
) -> dict[str, Any]:
  """Results of so many file systems of random size that fill up."""
  failures, named, resumed = [], [], collections.Counter()
  for i in range(trials):
    with tempfile.TemporaryDirectory() as folder:
      size = f'size={rng.randint(600, 9000)}k'
      command = ['mount', '-t', 'tmpfs', '-o', size, 'tmpfs', folder]
      mounted = subprocess.run(command, capture_output=True, text=True)
      if mounted.returncode:
        reason = f'may not mount: {mounted.stderr.strip()}'
        return dict(trials=0, failures=[], skipped=reason)
      try:
        path = pathlib.Path(folder) / 'checkpoints'
        with run(1, child_lib.fill_the_disk, path) as (process,):
          said = _expect(process, 'named')
          named.append(said['named'].replace(folder, '...'))
          resumed[said['resumed']] += 1
      except (AssertionError, TimeoutError) as e:
        failures.append(f'trial {i}: {e}')
      finally:
        subprocess.run(['umount', '-l', folder], check=True)
    bar.update()
  return dict(
    trials=trials,
    failures=failures,
    examples=named[:3],
    resumed_from={str(k): n for k, n in sorted(resumed.items())},
  )


def main(argv):
  """Runs all trials; exits with 1 if one has failed."""
  del argv
  tqdm.tqdm.monitor_interval = 0  # No thread where processes are forked.
  rng = random.Random(_SEED.value)
  counts = {1: _KILLS.value, **dict.fromkeys((2, 3, 4), _PAIRS.value)}
  total = sum(counts.values()) + len(_DAMAGES) * _DAMAGED.value + _FULL.value
  results = {'jax': jax.__version__, 'cores': os.cpu_count(), 'kills': {}}
  begin = time.monotonic()
  with tqdm.tqdm(total=total, unit='trial', disable=None) as bar:
    results['damage'] = {
      kind: damages(kind, _DAMAGED.value, _SEED.value, bar) for kind in _DAMAGES
    }
    results['full disk'] = full_disks(_FULL.value, rng, bar)
    for count, trials in counts.items():
      found = kills(count, trials, rng, bar)
      results['kills'][f'{count} processes'] = found
      if bar.disable:  # A log instead of a terminal.
        print(f'{count} processes: {found}', file=sys.stderr)
  results['seconds'] = round(time.monotonic() - begin)
  failures = _failures(results)
  results['num_failures'] = len(failures)
  out = pathlib.Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(results, indent=1) + '\n')
  print('\n'.join(failures) or f'{total} trials, none failed; see {out}')
  sys.exit(bool(failures))


def _failures(results):
  """All failures, wherever they are."""
  if isinstance(results, dict):
    own = results.get('failures', [])
    return own + [f for v in results.values() for f in _failures(v)]
  return []


if __name__ == '__main__':
  app.run(main)
