"""The programs are those that training and serving run."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import configs
from experiments import tpu_programs
from experiments.tpu_programs import ServingStep
from experiments.tpu_programs import TrainingStep
from jaxserve.engine.config import EngineConfig
from jaxtrain.models.config import ModelConfig

_TINY = ModelConfig(
  vocab_size=256,
  embed_dim=128,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  mlp_dim=256,
  max_seq_len=256,
)
_CONFIG = {
  **configs.load('quickstart'),
  'model': _TINY,
  'seq_len': 128,
  'batch_size': 8,
  'mesh': 'data=2,fsdp=2',
}
_ENGINE = EngineConfig(
  max_num_requests=4,
  max_seq_len=64,
  page_size=8,
  max_step_tokens=16,
  token_buckets=(4, 16),
)


def test_a_training_step():
  program = TrainingStep(_CONFIG)
  step, (state, batch) = program(jax.devices()[:4])
  new, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert metrics['loss'].shape == ()
  assert batch['tokens'].shape == (8, 128)
  assert program.tokens == 8 * 128


def test_values_that_steer_attention():
  program = TrainingStep(_CONFIG)
  _, args = program(jax.devices()[:4])
  values = program.values(args)
  leaves = jax.tree_util.tree_leaves_with_path(args)
  known = {
    jax.tree_util.keystr(path): value
    for (path, leaf), value in zip(leaves, values, strict=True)
    if value is not None
    for _ in [np.testing.assert_equal(value.shape, leaf.shape)]
  }
  assert list(known) == ["[1]['positions']", "[1]['segment_ids']"]


def test_model_flops_by_both_conventions():
  program = TrainingStep(_CONFIG)
  full, causal = (program.model_flops(f) for f in (True, False))
  # 12 L H Q T of PaLM a token, or half of it and the diagonal.
  square = 12 * 4 * 32 * 128 * program.tokens
  assert full - 6 * _TINY.num_active_params * program.tokens == square
  assert full - causal == pytest.approx(square / 2 * 127 / 128)


def test_state_is_at_least_what_it_is():
  program = TrainingStep(_CONFIG)
  _, (state, _) = program(jax.devices()[:4])
  kept = (state.params, state.opt_state)
  real = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(kept)
  )
  assert 0.95 * real < program.state_bytes(4) <= real
  offloaded = dataclasses.replace(program, offload=True)
  assert offloaded.state_bytes(4) == program.state_bytes(4) / 3


def test_mesh_sizes():
  sizes = tpu_programs.mesh_sizes('fsdp=-1,tensor=2', 16)
  assert (sizes['fsdp'], sizes['tensor'], sizes['data']) == (8, 2, 1)


@pytest.mark.parametrize('num_tokens', [4, 16])
def test_a_serving_step_at_its_longest(num_tokens):
  program = ServingStep(_TINY, _ENGINE, num_tokens, mesh='tensor=2')
  step, args = program(jax.devices()[:2])
  params, pages, history, words, buffer = args
  new_pages, new_history, packed, taps = jax.eval_shape(step, *args)
  assert new_pages.k.shape == pages.k.shape == (1, 32, 2, 8, 32)
  assert new_history.shape == history.shape == (4, 64)
  assert words.shape[0] == 4 and taps == ()
  assert packed.shape == (4, 3 + 2 * _ENGINE.max_logprobs)
  *unknown, value = program.values(args)
  assert not any(x is not None for x in unknown)
  assert len(unknown) == len(jax.tree.leaves(args)) - 1
  assert value.shape == buffer.shape
  fields = {
    name: value[start : start + int(np.prod(shape))].reshape(shape)
    for name, (start, shape) in tpu_programs.Layout(
      num_tokens, 4, 8
    ).fields.items()
  }
  last = num_tokens - 3
  np.testing.assert_array_equal(fields['query_start'], [0, 1, 2, 3, 3 + last])
  np.testing.assert_array_equal(fields['kv_len'], [64] * 4)
  np.testing.assert_array_equal(
    fields['positions'], [63] * 3 + list(range(64 - last, 64))
  )
  # Each token's slot is where the page table says.
  row, position = fields['token_row'], fields['positions']
  page = fields['page_table'][row, position // 8]
  np.testing.assert_array_equal(fields['slot'], page * 8 + position % 8)
