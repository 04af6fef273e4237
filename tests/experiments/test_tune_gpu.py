"""The tuner of GPU kernels, with a kernel of XLA and a timer that knows."""

import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_record
from experiments.benchmarks import gpu_timing
from experiments.benchmarks import tune_gpu
from experiments.benchmarks import tune_gpu_rows
from experiments.benchmarks import tuned_json
from pallas_kernels import gpu_compiler
from pallas_kernels.common import dispatch
from pallas_kernels.common import tuned

_CANDIDATES = [dict(block=b) for b in (8, 16, 32, 64, 128)]
_SECONDS = {8: 5e-6, 16: 4e-6, 32: 1e-6, 64: 3e-6, 128: 2e-6}
_NAME = 'a norm'


@pytest.fixture
def kernel(monkeypatch, tmp_path):
  """A backend of rms_norm: wrong with blocks of 32, broken with those of 64."""
  module = types.ModuleType('pallas_kernels.rms_norm.fake_gpu')
  module.__file__ = str(tmp_path / 'fake_gpu.py')
  xla = dispatch.load('rms_norm', 'xla', 'rms_norm_forward')

  def rms_norm_forward(x, scale, residual, *, config=None):
    # Another kernel that it calls.
    tuned.lookup('rms_norm', 'h200', dict(width=1), function='other')
    if config is None:
      config = tuned.lookup(
        'rms_norm', 'h200', dict(width=x.shape[1]), function='norm_gpu'
      )
    if config.get('block') == 64:
      raise ValueError('K must be a multiple of 128')
    norm, total = xla(x, scale, residual)
    return norm * (2 if config.get('block') == 32 else 1), total

  rms_norm_forward.__module__ = module.__name__
  module.rms_norm_forward = rms_norm_forward
  module.candidates = lambda chip, *args, **static: list(_CANDIDATES)
  monkeypatch.setitem(sys.modules, module.__name__, module)
  import pallas_kernels.rms_norm

  monkeypatch.setattr(
    pallas_kernels.rms_norm, 'fake_gpu', module, raising=False
  )
  return module


class _Timer:
  """Computes as `JaxCalls`, and says how long each block takes."""

  made = []

  def __init__(self, fn, args):
    self._calls = gpu_timing.JaxCalls(fn, args)
    self._block = fn.keywords['config']['block']
    _Timer.made.append(self._block)

  def result(self):
    return self._calls.result()

  def seconds(self, runs):
    return _SECONDS[self._block], 0.0


@pytest.fixture(autouse=True)
def none_made():
  _Timer.made.clear()


@pytest.fixture
def record(tmp_path):
  return gpu_record.Record(tmp_path / 'gpu_test.json')


def _section(record, budget_s=100.0):
  return gpu_record.Section(
    record, 'tune', budget_s=budget_s, implementation='fake_gpu'
  )


_ROW = tune_gpu_rows._norm(16, 32)


def _tune(section, **kwargs):
  order = lambda name, candidates: list(candidates)
  kwargs = dict(order=order, share=1.0, timer=_Timer) | kwargs
  tune_gpu.tune(section, _NAME, _ROW, 'h200', **kwargs)


def test_asks_the_kernel_what_it_looks_up(kernel, tmp_path):
  target = tune_gpu.find_target(_ROW, 'fake_gpu', 'h200')
  assert target.function == 'norm_gpu' and target.features == dict(width=32)
  assert target.path == tmp_path / 'tuned.json'
  assert target.candidates == _CANDIDATES


def test_keeps_the_fastest_that_is_right(kernel, record, tmp_path, monkeypatch):
  _tune(_section(record))
  [entry] = tuned_json.read(tmp_path / 'tuned.json')['norm_gpu']
  assert entry == dict(
    chip='h200', features=dict(width=32), config=dict(block=128), us=2.0
  )
  rows = {r['contender']: r for r in record.rows('tune')}
  assert 'relative error' in rows['{"block": 32}']['error']
  assert 'multiple of 128' in rows['{"block": 64}']['error']
  assert not any(row.get('wrong') for row in rows.values())
  found = rows['all']
  assert (found['timed'], found['failed'], found['untried']) == (3, 2, 0)
  # What is written is what a kernel finds.
  entries = tuned_json.read(tmp_path / 'tuned.json')
  monkeypatch.setattr(tuned, '_entries', lambda op: entries)
  config = tuned.lookup('rms_norm', 'h200', dict(width=64), function='norm_gpu')
  assert config == dict(block=128)
  assert tuned.lookup('rms_norm', 'h200', dict(width=64)) == {}


def test_does_not_repeat_itself(kernel, record, tmp_path):
  _tune(_section(record))
  made = len(_Timer.made)
  # Another record: the entry alone says that it is done.
  other = gpu_record.Record(tmp_path / 'other.json')
  _tune(_section(other))
  assert len(_Timer.made) == made
  assert other.rows('tune')[0]['skipped'] == 'tuned already'
  _tune(_section(gpu_record.Record(tmp_path / 'third.json')), redo=True)
  assert len(_Timer.made) > made


def test_stops_in_time_and_goes_on(kernel, record, tmp_path, monkeypatch):
  section = _section(record)
  left = property(lambda _: 100.0 if len(_Timer.made) < 2 else -1.0)
  monkeypatch.setattr(gpu_record.Section, 'left_s', left)
  _tune(section)
  assert _Timer.made == [8, 16]
  [entry] = tuned_json.read(tmp_path / 'tuned.json')['norm_gpu']
  assert entry['config'] == dict(block=16) and entry['incomplete']
  monkeypatch.undo()
  sys.modules[kernel.__name__] = kernel
  try:
    _tune(_section(record))
  finally:
    del sys.modules[kernel.__name__]
  # 8 and 16 only once more, by turns with 128.
  assert _Timer.made[2:] == [32, 64, 128, 16, 8]
  [entry] = tuned_json.read(tmp_path / 'tuned.json')['norm_gpu']
  assert entry['config'] == dict(block=128) and 'incomplete' not in entry


def test_what_killed_its_process_is_not_tried_again(kernel, record, tmp_path):
  first = _section(record)
  first.add(_NAME, '{"block": 128}', started=True, wrong=False)
  _tune(_section(record))
  [entry] = tuned_json.read(tmp_path / 'tuned.json')['norm_gpu']
  assert entry['config'] == dict(block=16)
  assert 128 not in _Timer.made


def test_entries_of_others_stay(kernel, record, tmp_path):
  path = tmp_path / 'tuned.json'
  other = dict(chip='v6e', features=dict(width=32), config={}, cycles=1)
  tuned_json.keep(path, 'norm_gpu', other)
  tuned_json.keep(path, 'norm', other)
  _tune(_section(record))
  entries = tuned_json.read(path)
  assert entries['norm'] == [other] and entries['norm_gpu'][0] == other
  assert len(entries['norm_gpu']) == 2
  # One entry a line, so that a commit shows what has changed.
  assert len(path.read_text().splitlines()) == 2 + 3 + 4


def test_a_kernel_that_declines_is_a_row(kernel, record):
  def declines(*args, **kwargs):
    raise NotImplementedError('float32')

  declines.__module__ = kernel.__name__
  kernel.rms_norm_forward = declines
  _tune(_section(record))
  assert record.rows('tune')[0]['skipped'] == 'float32'
  missing = gpu_record.Section(
    record, 'other', budget_s=10, implementation='no_such'
  )
  _tune(missing)
  assert 'no no_such' in record.rows('other')[0]['skipped']


def test_what_spills_comes_last():
  row = lambda block, **fields: dict(
    row=_NAME, contender=json.dumps(dict(block=block)), **fields
  )
  good = dict(spill_bytes=0, warnings=[])
  rows = [
    row(8, kernels=[good, good | dict(spill_bytes=4)]),
    row(16, error='does not compile'),
    row(32, kernels=[good | dict(warnings=['serialized'])]),
    row(64, kernels=[good]),
  ]
  found = tune_gpu.by_compiled(rows, _NAME, _CANDIDATES)
  blocks = [config['block'] for config in found]
  assert set(blocks[:2]) == {64, 128} and set(blocks[2:]) == {8, 32}


@pytest.mark.parametrize('name', tune_gpu_rows.TINY)
def test_rows_have_what_their_functions_take(name):
  row = tune_gpu_rows.TINY[name]
  args = jax.jit(row.make)(jax.random.key(0))
  expected = row.expected(args)
  f = dispatch.load(row.op, 'xla', row.function)
  actual = jax.jit(functools.partial(f, **row.static))(*args)
  assert gpu_timing.relative_error(actual, expected) < row.tolerance
  # That it is computed in float32 from the same values.
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(expected))


def test_rows_of_models_have_shapes():
  for row in tune_gpu_rows.ROWS.values():
    args = jax.eval_shape(row.make, jax.random.key(0))
    f = dispatch.load(row.op, 'xla', row.function)
    jax.eval_shape(functools.partial(f, **row.static), *args)


@pytest.mark.skipif(
  not gpu_compiler.is_installed(), reason='needs the GPU compiler'
)
def test_dry_run(tmp_path, capsys):
  assert not tune_gpu.main(
    [
      *('--dry_run', '--rows=tiny attention, head dim 64', '--most=1'),
      *(f'--out={tmp_path}', '--name=test', '--budget_s=300'),
    ]
  )
  [row] = gpu_record.Record(tmp_path / 'gpu_test.json').rows('dry_run')
  [kernel] = row['kernels']
  assert 'flash_attention' in kernel['name']
  assert 24 < kernel['registers'] < 256 and kernel['spill_bytes'] == 0
  assert 0.1 < kernel['tensor_share'] <= 1
  assert f'{kernel["registers"]} registers, 0 bytes' in capsys.readouterr().out


def test_unknown_row(capsys):
  assert tune_gpu.main(['--rows=no such row']) == 2
  assert 'no row contains' in capsys.readouterr().out


def test_every_row_has_a_kernel_that_looks_up_one_entry():
  for name, row in tune_gpu_rows.ROWS.items():
    target = tune_gpu.find_target(row, 'pallas_gpu', 'h200')
    assert target.path.parent.name == row.op, name
    assert len(target.candidates) >= 1 and target.features, name
