"""Causal attention on meshes, and in a training step compiled for TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import train_state
from jaxtrain import train_step
from jaxtrain.models.attention import Causal
from jaxtrain.models.attention import LayerSpec
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh

_RULES = PRESETS['default']


def _inputs(t=24, n=4, k=2, h=8):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(4, t, heads, h)), jnp.float32)
    for heads in (n, k, k)
  )
  ids = jnp.asarray(rng.integers(0, 2, (4, t)).cumsum(1) // 5, jnp.int32)
  return q, k, v, ids


def _loss(shard, q, k, v, ids):
  layer = LayerSpec(jnp.int32(0), jnp.int32(7), scale=0.3, soft_cap=5.0)
  out, cache = Causal(ids, shard=shard)(q, k, v, None, 'cache', layer)
  assert cache == 'cache'
  return jnp.sum(jnp.sin(out)), out


@pytest.mark.parametrize(
  'mesh, heads',
  [
    ('data=2,fsdp=2,tensor=2', (4, 2)),
    ('tensor=4', (4, 2)),  # More shards than kv heads: two copies of each.
    ('fsdp=2,context=2,tensor=2', (4, 2)),  # Sequence shards trade heads.
    ('context=8', (4, 4)),  # Fewer heads than sequence shards.
  ],
)
def test_a_mesh_changes_neither_value_nor_gradient(mesh, heads):
  q, k, v, ids = _inputs(n=heads[0], k=heads[1])
  shard = constrainer(make_mesh(mesh), _RULES)
  run = lambda shard: jax.jit(
    jax.value_and_grad(
      lambda *args: _loss(shard, *args, ids), (0, 1, 2), has_aux=True
    )
  )(q, k, v)
  (_, out), grads = run(shard)
  (_, expected), expected_grads = run(constrainer(None, _RULES))
  np.testing.assert_allclose(out, expected, atol=1e-6)
  for a, e in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(a, e, atol=1e-5)


def _model(shard, dtype=jnp.float32):
  config = ModelConfig(
    vocab_size=512,
    embed_dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=512,
    max_seq_len=256,
  )
  return Transformer(config, dtype=dtype, shard=shard)


def test_a_sharded_model_initialises_and_applies_without_an_attend():
  shard = constrainer(make_mesh('data=2,tensor=2'), _RULES)
  tokens = jnp.zeros((2, 8), jnp.int32)
  params = jax.jit(_model(shard).init)(jax.random.key(0), tokens)
  run = lambda shard: jax.jit(_model(shard).apply)(params, tokens)[0]
  np.testing.assert_allclose(
    run(shard), run(constrainer(None, _RULES)), atol=1e-4
  )


def _program(devices):
  """A jitted training step over `devices`, and its abstract arguments."""
  mesh = make_mesh('data=2,tensor=2', devices=devices)
  model = _model(constrainer(mesh, _RULES), jnp.bfloat16)
  tx = optax.sgd(0.1)
  step = train_step.make_train_step(model, tx, mesh, _RULES)
  spec = train_state.state_spec(model, tx, mesh, _RULES)
  batch = {
    name: jax.ShapeDtypeStruct(
      (4, 256), 'float32' if name == 'weights' else 'int32', sharding=sharding
    )
    for name, sharding in train_step.batch_shardings(mesh, _RULES).items()
  }
  return step, (spec.abstract, batch)


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the TPU compiler'
)
def test_a_training_step_for_tpus_has_the_kernel_both_ways(tmp_path):
  from pallas_kernels import tpu_compiler

  compiled = tpu_compiler.compile_built(
    _program, topology='v5e:2x2', schedules=False, cache_dir=tmp_path
  )
  names = ' '.join(compiled.kernels)
  assert 'flash_attention_forward' in names
  assert 'flash_attention_backward' in names
