"""Real children: heard, ended, and never left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.elastic import processes
from experiments.elastic.health import Health

_ROOT = pathlib.Path(__file__).parents[3]


def _until(condition, timeout_s=30):
  deadline = time.monotonic() + timeout_s
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def _runs(pid):
  """Whether a process exists and is not a zombie."""
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(')')[2].split()[0] != 'Z'


def _child(command):
  lines = []
  return processes.Child('7', ['sh', '-c', command], lines.append), lines


def test_output_is_relayed_and_exit_codes_are_seen():
  child, lines = _child('echo one; echo two >&2; exit 5')
  _until(lambda: child.exit_code() is not None and len(lines) == 2)
  assert child.exit_code() == 5 and lines == ['[7] one', '[7] two']
  child.kill()  # Of no effect.
  killed, _ = _child('kill -SEGV $$')
  _until(lambda: killed.exit_code() is not None)
  assert killed.exit_code() == -signal.SIGSEGV


def test_kill_ends_what_the_child_has_started_even_if_stopped():
  child, lines = _child('sleep 600 & echo $!; kill -STOP $!; wait')
  _until(lambda: lines)
  grandchild = int(lines[0].split()[1])
  os.kill(child.pid, signal.SIGSTOP)
  child.kill()
  assert child.exit_code() == -signal.SIGKILL
  _until(lambda: not _runs(grandchild))


def test_terminate_can_be_answered():
  child, lines = _child(
    'trap "echo bye; exit 0" TERM; echo ready; while :; do sleep 0.01; done'
  )
  _until(lambda: lines)
  child.terminate()
  _until(lambda: child.exit_code() is not None)
  assert child.exit_code() == 0


def test_nobody_outlives_a_parent_that_is_killed():
  parent = subprocess.Popen(
    [
      sys.executable,
      '-c',
      'import time\n'
      'from experiments.elastic.processes import Child\n'
      'for _ in range(3):\n'
      '  print(Child("x", ["sleep", "600"], print).pid, flush=True)\n'
      'time.sleep(600)',
    ],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  pids = [int(parent.stdout.readline()) for _ in range(3)]
  # They have become what they were told to.
  _until(
    lambda: all(
      b'sleep' in pathlib.Path(f'/proc/{p}/cmdline').read_bytes() for p in pids
    )
  )
  parent.kill()
  parent.wait()
  parent.stdout.close()
  _until(lambda: not any(map(_runs, pids)))


def test_a_child_whose_parent_has_died_already_does_nothing():
  done = subprocess.run(
    [sys.executable, str(processes._DIE_WITH_PARENT), '1', 'echo', 'alive'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and done.stdout == ''
  assert 'process 1 has died' in done.stderr


def test_ports_are_free():
  ports = {processes.free_port() for _ in range(5)}
  assert all(1024 <= p < 65536 for p in ports)


def test_health_is_asked_until_it_is_well(tmp_path):
  health = Health(f'test -e {tmp_path}/well_{{slot}}', every_s=0.0)
  assert health.ask(frozenset()) == frozenset()
  for _ in range(3):
    assert health.ask({1, 2}) == frozenset()
    time.sleep(0.02)
  (tmp_path / 'well_2').touch()
  _until(lambda: health.ask({1, 2}) == {2})
  # Lost again: it has to say so anew.
  assert health.ask({1}) == frozenset()
  (tmp_path / 'well_2').unlink()
  for _ in range(3):
    assert health.ask({1, 2}) == frozenset()
    time.sleep(0.02)
  health.close()


def test_no_answer_is_no():
  health = Health('exec sleep 600', every_s=0.0, timeout_s=0.05)
  health.ask({0})
  (_, first) = health._asked[0]
  _until(lambda: health.ask({0}) == frozenset() and first.poll() is not None)
  health.close()


@pytest.mark.parametrize('lost', [frozenset(), frozenset({1})])
def test_without_a_command_nobody_is_asked(lost):
  assert Health(None).ask(lost) is None
