"""Weight decay is for matrices, also when layers are stacked."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import base
from jaxtrain.sharding.partition import path_name


def test_decays_exactly_the_matrices_of_the_model():
  config = ModelConfig(
    vocab_size=8,
    embed_dim=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=8,
    max_seq_len=8,
    qkv_bias=True,
    qk_norm=True,
    post_norms=True,
  )
  tokens = jnp.zeros((1, 1), int)
  init = lambda key: Transformer(config).init(key, tokens)['params']
  params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
  mask = base.decay_mask(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  flat, _ = jax.tree_util.tree_flatten_with_path(mask)
  assert sorted(path_name(p) for p, decays in flat if decays) == [
    'embed/embedding',
    'layers/attention/key/kernel',
    'layers/attention/out/kernel',
    'layers/attention/query/kernel',
    'layers/attention/value/kernel',
    'layers/mlp/down/kernel',
    'layers/mlp/gate/kernel',
    'layers/mlp/up/kernel',
    'unembed/kernel',
  ]
  assert len(flat) == 9 + 3 + 7  # Biases and norms are there too.


def test_vectors_of_any_name_do_not_decay():
  params = {
    'w': jnp.ones((2, 3)),
    'v': jnp.ones(3),
    's': jnp.ones(()),
    'layers': {'w': jnp.ones((5, 2, 3)), 'v': jnp.ones((5, 3))},
  }
  assert base.decay_mask(params) == {
    'w': True,
    'v': False,
    's': False,
    'layers': {'w': True, 'v': False},
  }
  assert base.decay_mask(jnp.ones((2, 2))) is True
