"""Hugging Face directories against `transformers`' own logits, and mistakes.

The directories under tests/golden/ were written by `transformers` with the
logits that it computes (make_golden.py).
"""

import dataclasses
import functools
import json
import pathlib
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain.checkpoints import safetensors_io
from jaxtrain.checkpoints.huggingface import load_huggingface
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh
from jaxtrain.sharding import param_shardings

_GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'
_CASES = sorted(p.parent.name for p in _GOLDEN.glob('*/logits.npz'))
_TOLERANCE = 1e-4


@functools.cache
def _load(case):
  return load_huggingface(_GOLDEN / case)


@functools.cache
def _apply(config):
  model = Transformer(config)
  return jax.jit(lambda params, tokens: model.apply({'params': params}, tokens))


def _check_logits(case, config, params):
  golden = np.load(_GOLDEN / case / 'logits.npz')
  logits, _ = _apply(config)(params, golden['tokens'])
  np.testing.assert_allclose(logits, golden['logits'], rtol=0, atol=_TOLERANCE)


def _assert_equal(params, want):
  assert jax.tree.structure(params) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def _copy(case, directory):
  target = directory / case
  shutil.copytree(_GOLDEN / case, target)
  return target


def _edit_config(directory, **changes):
  file = directory / 'config.json'
  config_json = json.loads(file.read_text()) | changes
  file.write_text(json.dumps(config_json))


def _edit_tensors(directory, edit):
  file = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  edit(tensors)
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})


def test_the_goldens_are_small_and_complete():
  assert len(_CASES) == 9
  for case in _CASES:
    size = sum(f.stat().st_size for f in (_GOLDEN / case).iterdir())
    assert size < 300_000


@pytest.mark.parametrize('case', _CASES)
def test_logits_are_those_of_transformers(case):
  config, params = _load(case)
  _check_logits(case, config, params)


@pytest.mark.parametrize('case', _CASES)
def test_export_and_import_change_nothing(case, tmp_path):
  config, params = _load(case)
  save_huggingface(tmp_path / 'new', config, params, max_shard_bytes=50_000)
  assert len(list((tmp_path / 'new').glob('*.safetensors'))) > 1
  again, loaded = load_huggingface(tmp_path / 'new')
  assert again == config
  _assert_equal(loaded, params)
  _check_logits(case, again, loaded)


@pytest.mark.parametrize('case', _CASES)
def test_exported_tensors_are_those_of_transformers(case, tmp_path):
  config, params = _load(case)
  save_huggingface(tmp_path / 'new', config, params)
  new = safetensors.numpy.load_file(tmp_path / 'new' / 'model.safetensors')
  old = {}
  for file in (_GOLDEN / case).glob('*.safetensors'):
    old.update(safetensors.numpy.load_file(file))
  assert new.keys() == old.keys()
  for name, x in old.items():
    np.testing.assert_array_equal(new[name], x)


@pytest.mark.parametrize('case', _CASES)
@pytest.mark.parametrize('spec', ['fsdp=2,tensor=2', 'data=2,expert=2,fsdp=2'])
def test_parameters_are_born_on_their_shards(case, spec):
  config, want = _load(case)
  mesh, rules = make_mesh(spec), PRESETS['default']
  _, params = load_huggingface(_GOLDEN / case, mesh, rules)
  _assert_equal(params, want)
  boxed = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  shardings = param_shardings(boxed, mesh, rules)
  for x, sharding in zip(
    jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
  ):
    assert x.sharding == sharding
  kernel = params['layers']['attention']['query']['kernel']
  assert not kernel.sharding.is_fully_replicated


def test_a_shard_is_read_once_and_alone(monkeypatch):
  read = []
  original = safetensors_io.SafetensorsSource.read

  def recording(self, name, index):
    out = original(self, name, index)
    read.append(out.nbytes)
    return out

  monkeypatch.setattr(safetensors_io.SafetensorsSource, 'read', recording)
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  config, params = load_huggingface(_GOLDEN / 'qwen3', mesh)
  # Each byte once, though 'data' has two copies and norms have eight.
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  assert sum(read) == num_bytes == 4 * config.num_params
  # Never more than a quarter of the largest tensor, the embedding.
  assert max(read) <= 4 * config.vocab_size * config.embed_dim // 4


@pytest.mark.parametrize('case', ['qwen2', 'mixtral', 'qwen3'])
def test_sharded_parameters_are_exported_alike(case, tmp_path):
  mesh = make_mesh('fsdp=2,expert=2,tensor=2')
  config, params = load_huggingface(_GOLDEN / case, mesh)
  save_huggingface(tmp_path / 'a', config, params)
  host = jax.tree.map(np.asarray, params)
  save_huggingface(tmp_path / 'b', config, host)
  a, b = (tmp_path / d / 'model.safetensors' for d in 'ab')
  assert a.read_bytes() == b.read_bytes()


def test_dtype_is_the_stored_one_or_the_wanted_one(tmp_path):
  config, params = _load('llama2')
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  save_huggingface(tmp_path / 'new', config, half)
  config_json = json.loads((tmp_path / 'new/config.json').read_text())
  assert config_json['torch_dtype'] == 'bfloat16'
  _assert_equal(load_huggingface(tmp_path / 'new')[1], half)
  wide = load_huggingface(tmp_path / 'new', param_dtype=jnp.float32)[1]
  _assert_equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), half))


@pytest.mark.parametrize('case', ['qwen3_moe', 'mixtral'])
def test_fused_experts_of_transformers_5(case, tmp_path):
  directory = _copy(case, tmp_path)
  config, want = _load(case)

  def fuse(tensors):
    moe = want['layers']['moe']
    old = [n for n in tensors if '.experts.' in n or '_moe.gate.' in n]
    for name in old:
      router = tensors.pop(name)
      if name.endswith('block_sparse_moe.gate.weight'):
        tensors[name.replace('block_sparse_moe', 'mlp')] = router
    for i in range(config.num_layers):
      gate_up = np.concatenate([moe['gate'][i], moe['up'][i]], axis=-1)
      prefix = f'model.layers.{i}.mlp.experts.'
      tensors[prefix + 'gate_up_proj'] = np.ascontiguousarray(
        gate_up.swapaxes(1, 2)
      )
      tensors[prefix + 'down_proj'] = np.ascontiguousarray(
        np.swapaxes(moe['down'][i], 1, 2)
      )

  _edit_tensors(directory, fuse)
  mesh = make_mesh('expert=2,tensor=2,fsdp=2')
  _assert_equal(load_huggingface(directory, mesh)[1], want)


def test_a_repeated_output_matrix_must_be_the_tied_one(tmp_path):
  directory = _copy('llama3', tmp_path)
  config, want = _load('llama3')
  assert config.tie_embeddings

  def repeat(tensors):
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'  # Of old exports.
    tensors[name] = np.ones(8, np.float32)

  _edit_tensors(directory, repeat)
  _assert_equal(load_huggingface(directory)[1], want)

  def change(tensors):
    tensors['lm_head.weight'][-1, -1] += 1

  _edit_tensors(directory, change)
  with pytest.raises(ValueError, match='lm_head.weight is not model.embed_to'):
    load_huggingface(directory)


def test_the_decoder_of_a_model_with_a_vision_tower(tmp_path):
  directory = _copy('gemma3', tmp_path)
  text = json.loads((directory / 'config.json').read_text())
  (directory / 'config.json').write_text(
    json.dumps(dict(model_type='gemma3', text_config=text))
  )

  def prefix(tensors):
    for name in list(tensors):
      tensors[f'language_model.{name}'] = tensors.pop(name)
    tensors['vision_tower.embedding'] = np.ones(3, np.float32)

  _edit_tensors(directory, prefix)
  config, params = load_huggingface(directory)
  assert config == _load('gemma3')[0]
  _assert_equal(params, _load('gemma3')[1])


def _drop(tensors):
  del tensors['model.layers.1.mlp.up_proj.weight']


def _add(tensors):
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.ones(32, np.float32)


def _reshape(tensors):
  tensors['model.norm.weight'] = np.ones(33, np.float32)


def _to_int(tensors):
  tensors['model.norm.weight'] = np.ones(32, np.int32)


@pytest.mark.parametrize(
  'edit, words',
  [
    (_drop, r'missing tensors: model.layers.1.mlp.up_proj.weight \(40, 32\)'),
    (_add, r'no place for: model.layers.0.self_attn.q_proj.bias \(32,\)'),
    (_reshape, r'model.norm.weight has shape \(33,\), wanted \(32,\)'),
    (_to_int, 'model.norm.weight is stored as I32; supported: F64, F32'),
  ],
)
def test_wrong_tensors_are_named(edit, words, tmp_path):
  directory = _copy('llama2', tmp_path)
  _edit_tensors(directory, edit)
  with pytest.raises(ValueError, match=words):
    load_huggingface(directory)


@pytest.mark.parametrize('keep', [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
  directory = _copy('llama2', tmp_path)
  file = directory / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match='model.safetensors is truncated'):
    load_huggingface(directory)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match='nowhere is not a directory'):
    load_huggingface(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='config.json is missing'):
    load_huggingface(tmp_path)
  directory = _copy('llama2', tmp_path)
  (directory / 'model.safetensors').rename(directory / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='there is pytorch_model.bin'):
    load_huggingface(directory)
  directory = _copy('qwen3', tmp_path)
  (directory / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(ValueError, match='model-00002-of-00003.*is missing'):
    load_huggingface(directory)


def test_a_wrong_index_is_named(tmp_path):
  directory = _copy('qwen3', tmp_path)
  file = directory / 'model.safetensors.index.json'
  index = json.loads(file.read_text())
  index['weight_map']['model.norm.weight'] = 'model-00001-of-00003.safetensors'
  file.write_text(json.dumps(index))
  with pytest.raises(ValueError, match="00001.*places 'model.norm.weight'"):
    load_huggingface(directory)
  index['weight_map']['model.norm.weight'] = '../model.safetensors'
  file.write_text(json.dumps(index))
  with pytest.raises(ValueError, match='not a file beside it'):
    load_huggingface(directory)
  file.write_text('{}')
  with pytest.raises(ValueError, match='has no weight_map'):
    load_huggingface(directory)


def test_a_wrong_config_is_named(tmp_path):
  directory = _copy('llama2', tmp_path)
  _edit_config(directory, mlp_bias=True)
  with pytest.raises(ValueError, match='llama2: config.json.*mlp_bias=True'):
    load_huggingface(directory)
  _edit_config(directory, model_type='mamba')
  with pytest.raises(ValueError, match="model_type='mamba'.*known: gemma2"):
    load_huggingface(directory)
  (directory / 'config.json').write_text('{"model_type": ')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    load_huggingface(directory)
  (directory / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match='not a JSON object'):
    load_huggingface(directory)


def test_a_mesh_that_does_not_divide_names_the_parameter():
  with pytest.raises(ValueError, match='kv_heads.*size 2.*by 4'):
    load_huggingface(_GOLDEN / 'qwen3', make_mesh('tensor=4'))


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
  config, params = _load('llama2')
  original = safetensors_io.write_shard
  calls = []

  def interrupted(file, entries, arrays):
    calls.append(file)
    if len(calls) == 2:
      raise KeyboardInterrupt
    original(file, entries, arrays)

  monkeypatch.setattr(safetensors_io, 'write_shard', interrupted)
  with pytest.raises(KeyboardInterrupt):
    save_huggingface(tmp_path / 'new', config, params, max_shard_bytes=50_000)
  assert calls[0].parent.name == '.new.partial'
  assert not list(tmp_path.iterdir())


def test_the_leftovers_of_a_killed_export_are_replaced(tmp_path):
  config, params = _load('llama2')
  partial = tmp_path / '.new.partial'
  partial.mkdir()
  (partial / 'model-00001-of-00009.safetensors').write_bytes(b'half')
  save_huggingface(tmp_path / 'new', config, params)
  assert [p.name for p in tmp_path.iterdir()] == ['new']
  assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == [
    'config.json',
    'model.safetensors',
  ]


def test_export_overwrites_nothing(tmp_path):
  config, params = _load('llama2')
  (tmp_path / 'new').mkdir()
  save_huggingface(tmp_path / 'new', config, params)  # Empty: fine.
  before = (tmp_path / 'new' / 'model.safetensors').read_bytes()
  with pytest.raises(ValueError, match='not an empty directory'):
    save_huggingface(tmp_path / 'new', config, params)
  assert (tmp_path / 'new' / 'model.safetensors').read_bytes() == before


def test_export_names_what_does_not_fit(tmp_path):
  config, params = _load('llama2')
  target = tmp_path / 'new'
  fewer = {k: v for k, v in params.items() if k != 'unembed'}
  with pytest.raises(ValueError, match=r"missing \['unembed/kernel'\]"):
    save_huggingface(target, config, fewer)
  wrong = params | {'final_norm': {'scale': jnp.ones(3)}}
  with pytest.raises(ValueError, match=r'final_norm/scale is \(3,\), wanted'):
    save_huggingface(target, config, wrong)
  ints = params | {'final_norm': {'scale': jnp.ones(32, jnp.int32)}}
  with pytest.raises(ValueError, match='final_norm/scale is int32, not a flo'):
    save_huggingface(target, config, ints)
  other = dataclasses.replace(config, qk_norm=True)
  with pytest.raises(ValueError, match='cannot express qk_norm=True'):
    save_huggingface(target, other, params)
  with pytest.raises(ValueError, match='max_shard_bytes=0'):
    save_huggingface(target, config, params, max_shard_bytes=0)
  with pytest.raises(ValueError, match='has no tokenizer files'):
    save_huggingface(target, config, params, tokenizer_from=tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_tokenizer_comes_along(tmp_path):
  config, params = _load('llama2')
  source = tmp_path / 'source'
  source.mkdir()
  (source / 'tokenizer.json').write_text('{"a": 1}')
  (source / 'config.json').write_text('{"eos_token_id": 7, "other": 1}')
  save_huggingface(tmp_path / 'new', config, params, tokenizer_from=source)
  assert (tmp_path / 'new/tokenizer.json').read_text() == '{"a": 1}'
  config_json = json.loads((tmp_path / 'new/config.json').read_text())
  assert config_json['eos_token_id'] == 7
  assert config_json['bos_token_id'] is None
  assert 'other' not in config_json


def test_a_model_of_our_own_is_exported(tmp_path):
  config = ModelConfig(
    vocab_size=264,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_seq_len=64,
  )
  model = Transformer(config)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(x.dtype), nn.unbox(shapes)
  )
  save_huggingface(tmp_path / 'new', config, params)
  again, loaded = load_huggingface(tmp_path / 'new')
  assert again == config
  _assert_equal(loaded, params)
