"""The GPU benchmark's logic, on the CPU, with XLA's implementations."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import gpu
from experiments.benchmarks import gpu_attention
from experiments.benchmarks import gpu_checks
from experiments.benchmarks import gpu_engine
from experiments.benchmarks import gpu_floor
from experiments.benchmarks import gpu_loss_norm
from experiments.benchmarks import gpu_matmuls
from experiments.benchmarks import gpu_paged
from experiments.benchmarks import gpu_peaks
from experiments.benchmarks import gpu_record
from experiments.benchmarks import gpu_sanitizer
from experiments.benchmarks import gpu_timing
from experiments.benchmarks import gpu_torch
from jaxtrain.models.families.qwen3 import QWEN_3_0_6B

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def record(tmp_path):
  return gpu_record.Record(tmp_path / 'gpu_test.json')


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
  """Times do not matter here."""
  monkeypatch.setattr(gpu_timing, '_ROUNDS', 1)
  monkeypatch.setattr(gpu_timing, '_TURN_S', 0.0)


def _section(record, name='some', implementation='xla', budget_s=100.0):
  return gpu_record.Section(
    record,
    name,
    budget_s=budget_s,
    implementation=implementation,
    smoke=True,
  )


def _spoil(monkeypatch, module, op):
  """`implementation='spoiled'` is XLA's with results 5 % too large."""
  right = getattr(module, op)

  def call(*args, implementation, **kwargs):
    out = right(*args, implementation='xla', **kwargs)
    if implementation != 'spoiled':
      return out
    grow = lambda x: (x * 1.05).astype(x.dtype)
    if isinstance(out, tuple):
      return grow(out[0]), *out[1:]
    return grow(out)

  monkeypatch.setattr(module, op, call)


@pytest.mark.parametrize(
  'module, run, op, num_rows',
  [
    (gpu_attention, 'run', 'flash_attention', 2),
    (gpu_paged, 'run', 'ragged_paged_attention', 2),
    (gpu_matmuls, 'grouped', 'grouped_matmul', 2),
    (gpu_matmuls, 'quantized', 'quantized_matmul', 3),
    (gpu_loss_norm, 'loss', 'linear_cross_entropy', 2),
    (gpu_loss_norm, 'norm', 'rms_norm', 3),
  ],
)
def test_section_times_what_is_right_only(
  record, monkeypatch, module, run, op, num_rows
):
  record.update(peaks=dict(bf16_flops=1e12, fp8_flops=2e12, bytes_per_s=1e10))
  _spoil(monkeypatch, module, op)
  getattr(module, run)(_section(record, implementation='spoiled'))
  rows = record.rows('some')
  ours = [r for r in rows if r['contender'] == 'ours']
  assert len(ours) == num_rows
  for row in ours:
    assert row['wrong'] and 'us' not in row
    assert 'relative error' in row['error']
  others = [r for r in rows if r['contender'] != 'ours' and 'us' in r]
  # PyTorch and cuDNN may be absent; XLA is everywhere.
  if op == 'flash_attention':
    rest = [r for r in rows if r['contender'] == 'cudnn']
    assert all('CUDA' in r['skipped'] for r in rest) and len(rest) == 2
  else:
    assert len(others) >= num_rows
    assert all(0 < r['share'] and r['rounds'] == 1 for r in others)


@pytest.mark.slow
@pytest.mark.parametrize(
  'module, run',
  [
    (gpu_attention, 'run'),
    (gpu_paged, 'run'),
    (gpu_matmuls, 'grouped'),
    (gpu_matmuls, 'quantized'),
    (gpu_loss_norm, 'loss'),
    (gpu_loss_norm, 'norm'),
  ],
)
def test_the_kernels_take_what_a_section_gives_them(
  record, monkeypatch, module, run
):
  def lower(fn, *sets):
    with pltpu.force_tpu_interpret_mode(None):
      traced = jax.jit(fn).trace(*sets[0])
      text = traced.lower(lowering_platforms=('cuda',)).as_text()
    raise NotImplementedError(f'mosaic: {"mosaic_gpu" in text}')

  monkeypatch.setattr(module, 'JaxCalls', lower)
  getattr(module, run)(_section(record, implementation='pallas_gpu'))
  ours = [r for r in record.rows('some') if r['contender'] == 'ours']
  assert ours and all(r['skipped'] == 'mosaic: True' for r in ours)


def test_attention_is_compared_with_the_best_other(record, monkeypatch):
  monkeypatch.setattr(
    gpu_attention.gpu_torch,
    'attention',
    lambda backend, arrays: gpu_timing.JaxCalls(
      lambda q, k, v, *d: jax.nn.dot_product_attention(q, k, v, is_causal=True),
      arrays,
    ),
  )
  gpu_attention._row(_section(record), 128, 64, False)
  rows = {r['contender']: r for r in record.rows('some')}
  times = [rows[f'torch {name}']['us'] for name in ('flash', 'cudnn')]
  ratio = rows['ours']['best_other_over_ours']
  assert ratio == pytest.approx(min(times) / rows['ours']['us'], rel=1e-3)
  flops = 4 * 2 * 4 * 128**2 * 64 / 2
  expected = 1e-6 * flops / rows['ours']['us']
  assert rows['ours']['tflops'] == pytest.approx(expected, rel=1e-3)


def test_reference_of_attention_is_its_definition():
  keys = jax.random.split(jax.random.key(0), 3)
  t, g, h = 1024, 2, 8
  q = jax.random.normal(keys[0], (t, g, h))
  k, v = (jax.random.normal(key, (t, h)) for key in keys[1:])
  s = np.einsum('tgh,sh->gts', q, k) / np.sqrt(h)
  s = np.where(np.tri(t, dtype=bool), s, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  expected = np.einsum('gts,sh->tgh', p, v)
  actual = gpu_attention.reference(q, k, v)
  assert gpu_timing.relative_error(actual, expected) < 1e-5


def test_peaks_are_kept_for_others(record):
  section = _section(record)
  gpu_peaks.run(section)
  peaks = section.peaks()
  assert set(peaks) == {'bf16_flops', 'fp8_flops', 'bytes_per_s'}
  best = min(
    r['us'] for r in record.rows('some') if 'copy' in r['row'] and 'us' in r
  )
  assert peaks['bytes_per_s'] == pytest.approx(4 * 2**16 / best * 1e6)


def test_floor():
  section = types.SimpleNamespace(
    peaks=lambda: dict(bf16_flops=2e12, bytes_per_s=1e9)
  )
  found = gpu_floor.figures(section, 10.0, flops=1e7, num_bytes=1e3)
  assert found['bound'] == 'products' and found['share'] == pytest.approx(0.5)
  assert found['tflops'] == pytest.approx(1.0)
  assert found['gb_per_s'] == pytest.approx(0.1)
  found = gpu_floor.figures(section, 10.0, flops=1e7, peak='fp8_flops')
  assert 'share' not in found


@pytest.fixture
def checks(monkeypatch):
  """Of two ops; one case that the kernel declines, one that it gets wrong."""
  cases = [('rms_norm', 'bf16'), ('rope', 'bf16'), ('rms_norm', 'residual')]
  monkeypatch.setattr(gpu_checks, '_by_turns', lambda: iter(cases))
  real = gpu_checks.dispatch.load

  def load(op, name):
    if op == 'rope':
      raise NotImplementedError('only for the bold')
    return real(op, name)

  monkeypatch.setattr(gpu_checks.dispatch, 'load', load)


def test_checks(record, checks, monkeypatch):
  names = gpu_checks._cases('rms_norm')
  monkeypatch.setitem(names, 'residual', names['bf16'])
  gpu_checks.run(_section(record))
  first, declined, last = record.rows('some')
  assert first['relative_error'] < 1e-2 and 'relative_error' in last
  assert declined['skipped'] == 'only for the bold'


def test_check_sees_what_differs():
  f32 = jnp.float32
  e = jnp.array([1.0, -1.0, jnp.inf])
  assert gpu_checks._error(e, e) == 0
  assert gpu_checks._error(e.at[0].set(1.1), e) > 0.05
  assert gpu_checks._error(e.at[2].set(0), e) == float('inf')
  assert gpu_checks._error(e.at[0].set(jnp.nan), e) == float('inf')
  assert gpu_checks._error(jnp.arange(3), jnp.arange(3)) == 0
  assert gpu_checks._error(jnp.arange(3), jnp.arange(1, 4)) == float('inf')
  with pytest.raises(ValueError, match='not float32'):
    gpu_checks._error(jnp.ones(2, f32), jnp.ones(3, f32))


def test_case_in_a_process_of_its_own(capsys):
  assert gpu_checks.main(['rms_norm', 'bf16', 'xla']) == 0
  assert 'rms_norm: bf16: relative error' in capsys.readouterr().out


def test_workload_is_nano_vllms():
  load = gpu_engine.workload(256, 1024, QWEN_3_0_6B.vocab_size)
  assert sum(load.lengths) == 133_966
  assert sum(map(len, load.prompts)) == 142_827
  assert max(map(max, load.prompts)) == 10_000


def test_floor_of_the_engine():
  load = gpu_engine.Workload([[1] * 3, [1]], [2, 4])
  params = dict(w=np.zeros((10,), np.float32))
  kv = gpu_engine.kv_bytes_per_token(QWEN_3_0_6B, jnp.bfloat16)
  assert kv == 114_688
  found = gpu_engine.floor_bytes(QWEN_3_0_6B, params, jnp.bfloat16, load)
  assert found == 4 * 40 + kv * ((3 + 4) + (1 + 2 + 3 + 4))


def test_engine(record):
  record.update(peaks=dict(bytes_per_s=1e10))
  gpu_engine.run(_section(record))
  [row] = record.rows('some')
  assert row['all_finished'] and not row.get('wrong')
  assert row['tokens'] > 20 and row['logprob_error'] < 1e-4
  assert row['steps'] > 3 and row['host_ms_per_step']['max'] > 0
  assert 0 < row['share'] < 1


def _fake_sanitizer(tmp_path, monkeypatch, summary, status=0):
  program = tmp_path / 'compute-sanitizer'
  program.write_text(f'#!/bin/sh\necho "$@"\necho "{summary}"\nexit {status}\n')
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')


@pytest.mark.parametrize(
  'summary, status, outcome',
  [
    ('========= ERROR SUMMARY: 0 errors', 0, 'errors'),
    ('========= ERROR SUMMARY: 3 errors', 99, 'error'),
    ('========= ERROR SUMMARY: 0 errors', 1, 'error'),
    ('NotImplementedError: no kernel', 1, 'skipped'),
    ('Segmentation fault', 139, 'skipped'),
  ],
)
def test_sanitizer(record, tmp_path, monkeypatch, summary, status, outcome):
  _fake_sanitizer(tmp_path, monkeypatch, summary, status)
  gpu_sanitizer.run(_section(record))
  memcheck, racecheck = record.rows('some')
  assert memcheck['contender'] == 'memcheck' and outcome in memcheck
  assert bool(memcheck.get('wrong')) == (outcome == 'error')
  assert racecheck['contender'] == 'racecheck'


def test_no_sanitizer(record, monkeypatch):
  monkeypatch.setenv('PATH', '')
  gpu_sanitizer.run(_section(record))
  assert all('not on PATH' in r['skipped'] for r in record.rows('some'))


def test_torch_attention(record):
  pytest.importorskip('torch')
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, d = (
    jax.random.normal(key, (1, 128, n, 64), jnp.bfloat16)
    for key, n in zip(keys, (4, 2, 2, 4), strict=True)
  )
  out, dq, dk, dv = gpu_torch.attention(None, (q, k, v, d)).result()
  attend = lambda *a: jax.nn.dot_product_attention(*a, is_causal=True)
  expected, vjp = jax.vjp(attend, *(x.astype('float32') for x in (q, k, v)))
  wanted = (expected, *vjp(d.astype('float32')))
  assert gpu_timing.relative_error((out, dq, dk, dv), wanted) < 2e-2


def test_a_section_whose_modules_are_missing(record, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setitem(gpu.SECTIONS, 'norm', ('gpu_no_such_module', 'run'))
  options = [f'--out={tmp_path}', '--name=test', '--platform=cpu']
  assert gpu.main(['norm', *options]) == 0
  [row] = record.rows('norm')
  assert row['skipped'] == 'needs experiments.benchmarks.gpu_no_such_module'


def _run_script(tmp_path, *args, **env):
  return subprocess.run(
    [_ROOT / 'experiments' / 'benchmarks' / 'gpu.sh', *args],
    env=os.environ
    | dict(PYTHON=sys.executable, PLATFORM='cpu', SMOKE='1', NAME='test')
    | dict(OUT=str(tmp_path))
    | env,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_script_goes_on_behind_a_crash(tmp_path):
  """The second contender of the first row kills its process."""
  wrapper = tmp_path / 'wrapper.py'
  wrapper.write_text(
    'import os, runpy, sys\n'
    'if sys.argv[1] == "-c":\n'
    '  exec(sys.argv[2]); sys.exit()\n'
    'sys.path[0] = os.getcwd()\n'
    'module, sys.argv = sys.argv[2], sys.argv[2:]\n'
    'if sys.argv[1] == "norm":\n'
    '  from experiments.benchmarks import gpu_timing\n'
    '  real = gpu_timing.JaxCalls.result\n'
    '  def result(self, calls=[0]):\n'
    '    calls[0] += 1\n'
    '    gone = os.path.exists(os.environ["OUT"] + "/gone")\n'
    '    if calls[0] == 2 and not gone:\n'
    '      open(os.environ["OUT"] + "/gone", "w").close()\n'
    '      os.abort()\n'
    '    return real(self)\n'
    '  gpu_timing.JaxCalls.result = result\n'
    'runpy.run_module(module, run_name="__main__", alter_sys=True)\n'
  )
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/sh\nexec {sys.executable} {wrapper} "$@"\n')
  python.chmod(0o755)
  done = _run_script(
    tmp_path, '--budget_s=100', SECTIONS='norm', PYTHON=str(python)
  )
  content = json.loads((tmp_path / 'gpu_test.json').read_text())
  assert done.returncode == 0, done.stdout + done.stderr
  assert '## norm: done' in done.stdout and 'no problems' in done.stdout
  rows = content['sections']['norm']['rows']
  assert (tmp_path / 'gone').exists()
  assert content['machine']['device'] == 'cpu'
  [dead] = [r for r in rows if 'us' not in r]
  assert dead['contender'] == 'xla' and 'did not end' in dead['error']
  assert len(rows) == 6


def test_script_without_flags_of_xla(tmp_path):
  done = _run_script(tmp_path, '--budget_s=60', SECTIONS='engine', XLA_FLAGS='')
  assert done.returncode == 0, done.stdout + done.stderr
  content = json.loads((tmp_path / 'gpu_test.json').read_text())
  [row] = content['sections']['engine']['rows']
  assert row['tokens_per_s'] > 0 and row['all_finished']


def test_script_fails_if_a_check_did(tmp_path, record):
  _section(record, 'norm').add('row', 'ours', error='off', wrong=True)
  done = _run_script(tmp_path, SECTIONS=' ', KEEP='1')
  assert done.returncode == 1 and '1 problems' in done.stdout


def test_ops_work_with_the_stand_in_of_jaxtyping():
  code = (
    'import jaxtyping, jax.numpy as jnp\n'
    'assert "stand_ins" in jaxtyping.__file__\n'
    'from pallas_kernels import flash_attention, grouped_matmul\n'
    'from pallas_kernels import linear_cross_entropy, quantized_matmul\n'
    'from pallas_kernels import ragged_paged_attention\n'
    'from pallas_kernels.rms_norm import rms_norm\n'
    'import jaxserve.engine.engine, jaxserve.engine.runner\n'
    'assert float(rms_norm(jnp.ones((2, 8)), jnp.ones(8)).sum()) > 15\n'
  )
  stand_ins = _ROOT / 'experiments' / 'benchmarks' / 'stand_ins'
  env = os.environ | {'PYTHONPATH': f'{stand_ins}:{_ROOT}'}
  subprocess.run([sys.executable, '-c', code], env=env, check=True, timeout=60)
