"""The kernels at the shapes of models, compiled for an H200."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import tune_gpu_rows
from pallas_kernels import gpu_compiler

_ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
  not gpu_compiler.is_installed(), reason='needs the GPU compiler'
)
# Bytes that a thread spills; what does not fit is used once a block.
_SPILLS = {'flash_attention_forward': 256}
# Of one kernel each; `make test-slow` compiles the others.
_QUICK = (
  'attention 4096, head dim 128',
  'attention backward 4096, head dim 128',
  'paged decode, page 64, float8',
  'experts 512 x 2048 x 1536, 128',
  'W4A16 16 x 4096 x 14336',
  'norm 262144 x 128',
  'loss 8192 x 4096 x 128256',
)


def _run(tmp_path, *flags):
  out = tmp_path / 'kernels.json'
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.benchmarks.gpu_kernels'),
      f'--out={out}',
      *flags,
    ],
    cwd=_ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=280,
  )
  return done, out


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow)
    for n in tune_gpu_rows.ROWS
  ],
)
def test_compiles_without_spills(tmp_path, name):
  done, out = _run(tmp_path, f'--rows={name}')
  assert done.returncode == 0, done.stderr[-4000:]
  for kernel in json.loads(out.read_text())['rows'][name]:
    assert kernel['spill_bytes'] <= _SPILLS.get(kernel['kernel'], 0)
    assert kernel['spills_in_loop'] <= 2
    assert kernel['registers'] > 0 and kernel['issue_cycles'] > 0
    assert f'| {name} | {kernel["kernel"]} |' in done.stdout


def test_rows_that_are_not_there(tmp_path):
  done, _ = _run(tmp_path, '--rows=nothing')
  assert done.returncode != 0 and 'norm 262144 x 128' in done.stderr
  done, _ = _run(tmp_path, '--markdown')
  assert done.returncode != 0 and 'run without --markdown' in done.stderr
