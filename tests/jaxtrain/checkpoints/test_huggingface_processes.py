"""Two processes load one model onto a common mesh and export it together."""

import pathlib

from tests.jaxtrain.checkpoints import two_processes

_ROOT = pathlib.Path(__file__).parents[3]
_GOLDEN = _ROOT / 'tests' / 'golden'
_CHILD = """
source, target = arguments
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
  for out in two_processes.run(_CHILD, source, tmp_path / 'new'):
    assert 'done' in out
  import safetensors.numpy as st

  tensors = {}
  for file in (tmp_path / 'new').glob('*.safetensors'):
    tensors.update(st.load_file(file))
  want = st.load_file(source / 'model.safetensors')
  assert tensors.keys() == want.keys()
  assert all((tensors[name] == x).all() for name, x in want.items())
  assert (tmp_path / 'new' / 'model.safetensors.index.json').is_file()
  assert [p.name for p in tmp_path.iterdir()] == ['new']
