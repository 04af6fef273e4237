"""The file says how far the loop is, and that the process lives without it."""

import json
import time

import pytest

from jaxtrain import heartbeat
from jaxtrain.heartbeat import Heartbeat


def _until(condition, timeout_s=20):
  deadline = time.monotonic() + timeout_s
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.005)


def test_the_thread_beats_while_the_loop_stands(tmp_path):
  path = tmp_path / 'new' / '0.json'
  with Heartbeat(path, every_s=0.01):
    first = heartbeat.read(path)
    _until(lambda: heartbeat.read(path).alive > first.alive + 3)
    assert heartbeat.read(path).loop == first.loop
  last = heartbeat.read(path)
  time.sleep(0.05)
  assert heartbeat.read(path) == last


def test_steps_phases_and_the_end(tmp_path):
  path = tmp_path / '0.json'
  with Heartbeat(path, every_s=0.01) as beat:
    beat.resumed(7)
    with beat.phase('step'):
      with beat.phase('compile'):
        _until(lambda: heartbeat.read(path).phase == 'compile')
      beat.step_done(8)
      _until(lambda: heartbeat.read(path).step == 8)
      assert heartbeat.read(path).phase == 'step'
    assert heartbeat.read(path).ended is None
    beat.end('data')
    seen = heartbeat.read(path)
  assert (seen.first_step, seen.step, seen.ended) == (7, 8, 'data')
  assert seen.loop == 8


def test_an_error_is_the_end(tmp_path):
  with pytest.raises(KeyError), Heartbeat(tmp_path / '0.json') as beat:
    beat.step_done(1)
    raise KeyError
  seen = heartbeat.read(tmp_path / '0.json')
  assert (seen.step, seen.ended, seen.error) == (1, None, 'KeyError')


def test_processes_read_apart_have_fingerprints_in_common(tmp_path):
  beats = []
  for last in (1500, 1507, 1900, 2040):
    with Heartbeat(tmp_path / f'{last}.json') as beat:
      for step in range(1000, last + 1):
        beat.fingerprint(step, {'a': (step, step + 1)})
      beat.end('data')
    beats.append(heartbeat.read(tmp_path / f'{last}.json').fingerprints)
  assert set.intersection(*(set(b) for b in beats)) >= {1024}
  assert set(beats[0]) & set(beats[1]) >= {1496}
  assert max(len(b) for b in beats) <= 16
  assert beats[0][1500] == {'a': (1500, 1501)}


def test_no_file_is_no_beat(tmp_path):
  assert heartbeat.read(tmp_path / 'none') is None


def test_no_half_of_a_file_is_ever_read(tmp_path):
  path = tmp_path / '0.json'
  with Heartbeat(path, every_s=0.001) as beat:
    beat.fingerprint(1, {str(i): (i,) for i in range(2000)})
    for _ in range(200):
      json.loads(path.read_text())
  assert [p.name for p in tmp_path.iterdir()] == ['0.json']


def test_wrong_arguments(tmp_path):
  with pytest.raises(ValueError, match='fingerprint_every=0'):
    Heartbeat(tmp_path / '0.json', fingerprint_every=0)
