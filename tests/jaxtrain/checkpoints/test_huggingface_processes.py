"""Two processes load one model onto a common mesh and export it together."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[3]
_GOLDEN = _ROOT / 'tests' / 'golden'
_CHILD = """
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
address, index, source, target = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from jaxtrain.checkpoints import safetensors_io
from jaxtrain.checkpoints.huggingface import load_huggingface
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.sharding import make_mesh

read = []
original = safetensors_io.SafetensorsSource.read
def recording(self, name, index):
  out = original(self, name, index)
  read.append(out.nbytes)
  return out
safetensors_io.SafetensorsSource.read = recording

config, params = load_huggingface(source, make_mesh('fsdp=4,tensor=2'))
total = sum(x.nbytes for x in jax.tree.leaves(params))
# A process reads its half, and the norms, which are everywhere.
assert total / 2 <= sum(read) < 0.6 * total, (sum(read), total)
save_huggingface(target, config, params, max_shard_bytes=60_000)
try:
  save_huggingface(target, config, params)
  raise AssertionError('an export was overwritten')
except ValueError as e:
  assert 'not an empty directory' in str(e), e
print('done')
"""


def test_two_processes_load_and_export(tmp_path):
  source = _GOLDEN / 'llama3'
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  env = {**os.environ, 'PYTHONPATH': str(_ROOT)}
  env.pop('XLA_FLAGS', None)
  children = [
    subprocess.Popen(
      [sys.executable, '-c', _CHILD, address, str(i), source, tmp_path / 'new'],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    for child in children:
      output, _ = child.communicate(timeout=120)
      assert child.returncode == 0 and 'done' in output, output[-3000:]
  except subprocess.TimeoutExpired:
    pytest.fail('the processes wait for each other')
  finally:
    for child in children:
      child.kill()
  import safetensors.numpy as st

  tensors = {}
  for file in (tmp_path / 'new').glob('*.safetensors'):
    tensors.update(st.load_file(file))
  want = st.load_file(source / 'model.safetensors')
  assert tensors.keys() == want.keys()
  assert all((tensors[name] == x).all() for name, x in want.items())
  assert (tmp_path / 'new' / 'model.safetensors.index.json').is_file()
  assert [p.name for p in tmp_path.iterdir()] == ['new']
