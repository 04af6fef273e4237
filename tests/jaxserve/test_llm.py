"""One model from every kind of file, on any mesh, gives the same tokens."""

import dataclasses
import importlib.util
import pathlib
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxserve.loading import place
from jaxtrain.checkpoints.huggingface import load_huggingface
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.checkpoints.manager import CheckpointManager
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import make_mesh

_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_ENGINE = EngineConfig(
  max_num_requests=4, page_size=4, max_step_tokens=16, token_buckets=(16,)
)
_GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=0)
_PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [31] * 19, [2], list(range(11))]


_SIX_HEADS = ModelConfig(
  vocab_size=32,
  embed_dim=16,
  num_layers=1,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
  max_seq_len=32,
)


def _naive(config, params):
  """Greedy tokens and their logprobs, every sequence recomputed each time."""
  logits = jax.jit(lambda t: Transformer(config).apply({'params': params}, t))
  results = []
  for prompt in _PROMPTS:
    ids, logprobs = list(prompt), []
    for _ in range(_GREEDY.max_tokens):
      padded = np.zeros((1, 32), np.int32)
      padded[0, : len(ids)] = ids
      row = jax.nn.log_softmax(logits(padded)[0][0, len(ids) - 1])
      ids.append(int(row.argmax()))
      logprobs.append(float(row.max()))
    results.append((tuple(ids[len(prompt) :]), logprobs))
  return results


def _check_served(expected, model, **kwargs):
  with LLM(model, engine=_ENGINE, **kwargs) as llm:
    outputs = llm.generate(_PROMPTS, _GREEDY, show_progress=False)
  for out, (tokens, logprobs) in zip(outputs, expected, strict=True):
    assert out.outputs[0].token_ids == tokens
    served = [lp.logprob for lp in out.outputs[0].logprobs]
    np.testing.assert_allclose(served, logprobs, atol=1e-4)


# Windows, caps, two rotations; experts; biases.
@pytest.mark.parametrize(
  'family, mesh',
  [('gemma3', 'tensor=4'), ('qwen3_moe', 'expert=2,tensor=2'), ('qwen2', '')],
)
def test_hugging_face_directory(family, mesh):
  config, params = load_huggingface(_GOLDEN / family)
  _check_served(_naive(config, params), _GOLDEN / family, mesh=mesh)


def test_gguf_file(tmp_path):
  spec = importlib.util.spec_from_file_location(
    'gguf_writer', _GOLDEN / 'gguf_writer.py'
  )
  writer = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(writer)
  writer.write_gguf(_GOLDEN / 'qwen3', tmp_path / 'model.gguf')
  config, params = load_huggingface(_GOLDEN / 'qwen3')
  expected = _naive(config, params)
  _check_served(expected, tmp_path / 'model.gguf', mesh='tensor=2')


def test_training_checkpoint_and_live_parameters(tmp_path):
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  config, params = load_huggingface(_GOLDEN / 'llama3', mesh)
  with CheckpointManager(tmp_path / 'checkpoints') as manager:
    manager.save(
      7,
      {'params': params, 'step': jnp.int32(7)},
      config=config,
      metadata={'tokenizer': 'byte'},
    )
  expected = _naive(config, params)
  _check_served(expected, tmp_path / 'checkpoints', mesh='tensor=2')
  # The trainer's own parameters, on its own mesh, with its own rules.
  rules = PRESETS['default']
  _check_served(expected, params, config=config, mesh=mesh, rules=rules)
  placed = place(params, config, mesh, rules)
  pointers = lambda tree: [
    s.data.unsafe_buffer_pointer()
    for x in jax.tree.leaves(tree)
    for s in x.addressable_shards
  ]
  assert pointers(placed) == pointers(params), 'parameters were copied'


def test_text_in_text_out_from_the_tokenizer_beside_the_model(tmp_path):
  config, params = load_huggingface(_GOLDEN / 'llama3')
  big = dataclasses.replace(config, vocab_size=264)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = nn.unbox(Transformer(big).init(jax.random.key(0), tokens))['params']
  with CheckpointManager(tmp_path) as manager:
    manager.save(
      1, {'params': params}, config=big, metadata={'tokenizer': 'byte'}
    )
  with LLM(tmp_path, engine=_ENGINE) as llm:
    [out] = llm.generate('Hi', _GREEDY, show_progress=False)
    assert out.prompt == 'Hi'
    assert out.prompt_token_ids == (256, *b'Hi')
    assert out.text == llm.tokenizer.decode(out.outputs[0].token_ids)
    [a, b] = llm.generate(
      ['x', 'y'],
      [_GREEDY, dataclasses.replace(_GREEDY, max_tokens=2)],
      show_progress=False,
    )
    assert [len(o.outputs[0].token_ids) for o in (a, b)] == [8, 2]
    assert 0 < a.time_to_first_token_s <= a.latency_s


def test_a_bad_prompt_runs_nothing_and_leaves_nothing():
  with LLM(_GOLDEN / 'qwen2', engine=_ENGINE) as llm:
    with pytest.raises(ValueError, match='request 1: the prompt is empty'):
      llm.generate([[1, 2], []], _GREEDY, show_progress=False)
    assert llm.engine.num_unfinished == 0
    with pytest.raises(ValueError, match='2 params for 1 prompts'):
      llm.generate([[1]], [_GREEDY, _GREEDY])
    assert llm.generate([], _GREEDY, show_progress=False) == []
    [out] = llm.generate(np.array([5, 6, 7]), _GREEDY, show_progress=False)
    assert out.prompt_token_ids == (5, 6, 7)


def test_refuses_heads_that_no_shard_can_hold_whole():
  config = dataclasses.replace(_SIX_HEADS, num_kv_heads=3)
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = Transformer(config).init(jax.random.key(0), tokens)
  with pytest.raises(
    ValueError, match='2 shards of heads do not fit num_heads'
  ):
    LLM(nn.unbox(init)['params'], config=config, mesh='tensor=2')


def test_refuses_what_is_not_a_model(tmp_path):
  with pytest.raises(ValueError, match='no model at'):
    LLM(tmp_path / 'nothing')
  with pytest.raises(ValueError):
    LLM(tmp_path)  # An empty directory.
  config, params = load_huggingface(_GOLDEN / 'qwen2')
  with pytest.raises(ValueError, match=r'needs LLM\(config='):
    LLM(params)
  with pytest.raises(ValueError, match='the parameter tree does not fit'):
    LLM({'embed': params['embed']}, config=config)
  wrong = dataclasses.replace(config, mlp_dim=2 * config.mlp_dim)
  with pytest.raises(ValueError, match='layers/mlp/.* got shape'):
    LLM(params, config=wrong)
  with pytest.raises(ValueError, match='beyond the context of the model'):
    LLM(
      params,
      config=config,
      engine=dataclasses.replace(_ENGINE, max_seq_len=10**6),
    )
  with pytest.raises(ValueError, match='needs 16 devices, but there are 8'):
    LLM(params, config=config, mesh='tensor=16')
  half = tmp_path / 'half'
  save_huggingface(half, config, params)
  file = half / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match='model.safetensors'):
    LLM(half)
  shutil.rmtree(half)
