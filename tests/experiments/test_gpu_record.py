"""Rows of the GPU benchmark: compared, kept, reported."""

import pathlib
import subprocess
import sys
import types

import pytest

from experiments.benchmarks import gpu
from experiments.benchmarks import gpu_record
from experiments.benchmarks import gpu_report
from experiments.benchmarks import gpu_timing
from experiments.benchmarks import gpu_torch
from experiments.benchmarks.gpu_timing import Contender

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def record(tmp_path):
  return gpu_record.Record(tmp_path / 'gpu_test.json')


def _section(record, name='some', budget_s=100.0):
  return gpu_record.Section(record, name, budget_s=budget_s)


class _Fixed:
  """A contender of a known time and result."""

  def __init__(self, seconds, result=1.0, fails=False):
    self._seconds, self._result, self._fails = seconds, result, fails

  def result(self):
    return self._result

  def seconds(self, runs):
    if self._fails:
      raise RuntimeError('out of memory')
    return self._seconds, 0.0


def _contender(timed, **kwargs):
  def build():
    if isinstance(timed, Exception):
      raise timed
    return timed

  return Contender(build, lambda out: abs(out - 1.0), 0.1, **kwargs)


def test_comparison(record):
  contenders = {
    'ours': _contender(_Fixed(2e-6), is_ours=True),
    'fast': _contender(_Fixed(1e-6)),
    'wrong': _contender(_Fixed(1e-9, result=2.0)),
    'nan': _contender(_Fixed(1e-9, result=float('nan'))),
    'absent': _contender(NotImplementedError('not here')),
    'broken': _contender(RuntimeError('no such symbol')),
    'dies later': _contender(_Fixed(1e-9, fails=True)),
  }
  gpu_timing.compare(
    _section(record), 'row', contenders, lambda us: dict(twice=2 * us)
  )
  rows = {r['contender']: r for r in record.rows('some')}
  assert rows['ours']['us'] == 2 and rows['ours']['twice'] == 4
  assert rows['ours']['best_other_over_ours'] == 0.5
  assert rows['fast']['us'] == 1
  for name in ('wrong', 'nan'):
    assert rows[name]['wrong'] and 'us' not in rows[name]
  assert rows['absent']['skipped'] == 'not here'
  for name in ('broken', 'dies later'):
    assert 'RuntimeError' in rows[name]['error'] and not rows[name]['wrong']
  problems = list(gpu_report.problems(record.read()))
  assert len(problems) == 2


def test_ours_must_run(record):
  contenders = {'ours': _contender(RuntimeError('illegal'), is_ours=True)}
  gpu_timing.compare(_section(record), 'row', contenders, lambda us: {})
  assert len(list(gpu_report.problems(record.read()))) == 1


def test_no_time_is_left(record):
  section = _section(record, budget_s=0.0)
  contenders = {'ours': _contender(_Fixed(1e-6), is_ours=True)}
  gpu_timing.compare(section, 'row', contenders, lambda us: {})
  assert record.rows('some')[0]['skipped'] == 'no time is left'


def test_goes_on_behind_what_killed_its_process(record):
  first = _section(record)
  first.add('row', 'done', us=1.0)
  first.add('row', 'killer', started=True, wrong=True)
  first.add('row', 'right', checked=True)
  second = _section(record)
  names = ('done', 'killer', 'right', 'new')
  contenders = {n: _contender(_Fixed(3e-6)) for n in names}
  gpu_timing.compare(second, 'row', contenders, lambda us: {})
  rows = {r['contender']: r for r in record.rows('some')}
  assert rows['done']['us'] == 1
  assert 'did not end' in rows['killer']['error'] and rows['killer']['wrong']
  assert rows['right']['us'] == 3 and rows['new']['us'] == 3


def test_a_lost_device_ends_the_process(record, monkeypatch):
  monkeypatch.setattr(gpu_record, '_device_works', lambda: False)
  with pytest.raises(SystemExit) as e:
    with _section(record).trying('row', 'ours', is_ours=True):
      raise RuntimeError('CUDA_ERROR_ILLEGAL_ADDRESS')
  assert e.value.code == gpu_record.DEVICE_LOST
  assert 'ILLEGAL' in record.rows('some')[0]['error']


def test_a_contender_that_hangs_ends_its_process(tmp_path):
  code = (
    'import time\n'
    'from experiments.benchmarks.gpu_record import Record, Section\n'
    f'record = Record({str(tmp_path / "r.json")!r})\n'
    'section = Section(record, "some", budget_s=60, hang_s=0.2)\n'
    'with section.trying("row", "ours", is_ours=True):\n'
    '  time.sleep(60)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=_ROOT, capture_output=True, timeout=30
  )
  assert done.returncode == 1 and b'Timeout' in done.stderr
  record = gpu_record.Record(tmp_path / 'r.json')
  # As if the time was over, which says nothing; then it is known.
  assert not list(gpu_report.problems(record.read()))
  _section(record)
  assert 'did not end' in next(gpu_report.problems(record.read()))


def test_times_by_cuda_events(monkeypatch):
  events = []

  class Event:
    def __init__(self, enable_timing):
      assert enable_timing

    def record(self):
      events.append(calls[0])

    def synchronize(self):
      pass

    def elapsed_time(self, end):
      return 3.0

  cuda = types.SimpleNamespace(
    Event=Event, is_available=lambda: True, synchronize=lambda: None
  )
  fake = types.SimpleNamespace(cuda=cuda)
  monkeypatch.setattr(gpu_torch, 'load', lambda: fake)
  calls = [0]

  def count(x):
    calls[0] += x

  timed = gpu_torch.TorchCalls(count, (1,), (1,))
  seconds, _ = timed.seconds(5)
  assert calls == [10] and events == [0, 10]
  assert seconds == pytest.approx(3e-3 / 10)


def test_report(record, tmp_path, capsys):
  record.update(machine=dict(device='a GPU'), peaks=dict(bytes_per_s=1e12))
  section = _section(record, 'attention')
  section.add('row', 'ours', us=2.0, tflops=500.0, share=0.5)
  section.add('row', 'cudnn', us=3.0, tflops=400.0)
  section.add('row', 'torch', skipped='not here')
  report = ['report', f'--out={tmp_path}', '--name=test']
  assert gpu.main(report) == 0
  printed = capsys.readouterr().out
  assert 'a GPU' in printed and '500.0' in printed and '50.0%' in printed
  assert 'SKIPPED: not here' in printed and 'no problems' in printed
  assert (tmp_path / 'gpu_test.png').stat().st_size > 1000
  gpu.main([*report[1:], 'note', '--of=paged', '--status=failed with 9'])
  assert gpu.main(report) == 1
  assert 'paged: failed with 9' in capsys.readouterr().out
