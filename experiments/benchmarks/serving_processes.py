"""Spawns engines, each in a process of its own on one core."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

_PEERS = pathlib.Path(__file__).parent / 'peers'
_ONE_THREAD = {
  name: '1'
  for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')
}


class EngineError(RuntimeError):
  """An engine's process ended, or its engine cannot be had."""


class Process:
  """A driver of `peers.protocol`, spoken to line by line.

  Args:
    command: Program and its first arguments.
    job: What it is given to do; `core` is where it runs.
  """

  def __init__(self, command: list[str], job: dict[str, Any]):
    self._errors = tempfile.TemporaryFile('w+')
    start = time.perf_counter()
    self._child = subprocess.Popen(
      [*command, json.dumps(job)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
      env=os.environ | _ONE_THREAD,
    )
    try:
      self.first_reply = self._read()
    except EngineError:
      self.close()
      raise
    self.start_s = time.perf_counter() - start

  def ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Sends a request and waits for the reply.

    Raises:
      EngineError: The process has ended; the end of what it printed is told.
    """
    self._child.stdin.write(json.dumps(request) + '\n')
    self._child.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Ends the process."""
    self._child.stdin.close()
    try:
      self._child.wait(timeout=5)
    except subprocess.TimeoutExpired:
      self._child.kill()
      self._child.wait()
    self._child.stdout.close()
    self._errors.close()

  def _read(self):
    line = self._child.stdout.readline()
    if line:
      return json.loads(line)
    self._errors.seek(0)
    raise EngineError('\n'.join(self._errors.read().splitlines()[-15:]))


def start_onemesh(job: dict[str, Any]) -> Process:
  """Our engine."""
  return Process([sys.executable, '-m', f'{__package__}.serving_onemesh'], job)


def start_peer(name: str, python: str | None, job: dict[str, Any]) -> Process:
  """Another engine: `name` is a file of `peers`.

  Raises:
    EngineError: It is not installed there, or does not start.
  """
  if python is None:
    raise EngineError('no --peer_python')
  process = Process([python, str(_PEERS / f'{name}.py')], job)
  if 'absent' in process.first_reply:
    process.close()
    raise EngineError(process.first_reply['absent'])
  return process


def run_once(
  module: str, job: dict[str, Any], programs: pathlib.Path
) -> dict[str, Any]:
  """Runs `experiments.benchmarks.<module>` on a job and returns its result.

  Args:
    module: Its `main` is `protocol.once`.
    job: What it is given to do.
    programs: Folder of compiled programs that outlive the process.

  Raises:
    EngineError: It failed.
  """
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(programs),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  with tempfile.TemporaryFile('w+') as errors:
    done = subprocess.run(
      [sys.executable, '-m', f'{__package__}.{module}', json.dumps(job)],
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      env=os.environ | _ONE_THREAD | cache,
    )
    if done.returncode:
      errors.seek(0)
      raise EngineError('\n'.join(errors.read().splitlines()[-15:]))
  return json.loads(done.stdout)
