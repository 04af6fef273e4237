"""Remat policies change memory, not gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.memory import policies
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer

_CONFIG = ModelConfig(
  vocab_size=32,
  embed_dim=32,
  num_layers=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=128,
  max_seq_len=64,
)


def _gradients(name, params=None):
  model = Transformer(_CONFIG, remat=policies.get(name))
  tokens = jax.random.randint(jax.random.key(1), (4, 64), 0, 32)
  if params is None:
    params = jax.jit(model.init)(jax.random.key(0), tokens)['params']

  def loss(params):
    logits, _ = model.apply({'params': params}, tokens)
    return jnp.mean(logits**2)

  compiled = jax.jit(jax.grad(loss)).lower(params).compile()
  temp = compiled.memory_analysis().temp_size_in_bytes
  return params, compiled(params), temp


def test_same_gradients_less_memory():
  params, expected, most = _gradients('none')
  temps = {'none': most}
  for name in policies.POLICIES:
    if name != 'none':
      _, grads, temps[name] = _gradients(name, params)
      jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5),
        grads,
        expected,
      )
  assert temps['full'] < temps['dots_no_batch'] < temps['none']
  assert temps['full'] < 0.6 * temps['none']


def test_unknown_policy_names_the_known():
  with pytest.raises(ValueError, match="'nothing'; known: none, dots"):
    policies.get('nothing')
