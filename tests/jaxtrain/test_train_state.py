"""Where the state lives follows from the parameters' axes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import optimizers
from jaxtrain import train_state as train_state_lib
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import PRESETS
from jaxtrain.sharding import constrainer
from jaxtrain.sharding import make_mesh

_CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  max_seq_len=32,
)
_RULES = PRESETS['default']


def _model(mesh):
  return Transformer(_CONFIG, shard=constrainer(mesh, _RULES))


def test_values_do_not_depend_on_the_mesh():
  states = []
  for spec in ('', 'data=2,fsdp=2,tensor=2'):
    mesh = make_mesh(spec)
    tx = optax.adamw(1e-3)
    states.append(
      train_state_lib.init_state(_model(mesh), tx, mesh, _RULES, seed=3)
    )
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert int(states[0].step) == 0
  other = train_state_lib.init_state(_model(mesh), tx, mesh, _RULES, seed=4)
  up = lambda s: np.asarray(s.params['layers']['mlp']['up']['kernel'])
  assert not np.array_equal(up(other), up(states[1]))
  assert not np.array_equal(other.rng, states[1].rng)


@pytest.mark.parametrize(
  'tx',
  [
    optimizers.get('adamw')(1e-3),
    optax.chain(optax.clip(1.0), optax.lion(1e-3)),
    optax.inject_hyperparams(optax.adam)(1e-3),
    optax.multi_transform(
      {'a': optax.adam(1e-3), 'b': optax.sgd(1e-3, momentum=0.9)},
      lambda params: jax.tree_util.tree_map_with_path(
        lambda path, p: 'a' if 'kernel' in str(path) else 'b', params
      ),
    ),
  ],
  ids=['adamw', 'lion', 'injected', 'multi'],
)
def test_moments_are_born_on_their_parameters_shards(tx):
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  state = train_state_lib.init_state(_model(mesh), tx, mesh, _RULES)
  kernel = state.params['layers']['mlp']['up']['kernel']
  assert kernel.sharding.spec == jax.P(None, 'fsdp', 'tensor')
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if "['up']['kernel']" in jax.tree_util.keystr(path)
  ]
  assert moments
  for leaf in moments:
    assert leaf.sharding.is_equivalent_to(kernel.sharding, leaf.ndim)


def test_leaves_of_other_shapes_are_replicated():
  mesh = make_mesh('fsdp=8')
  tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
  spec = train_state_lib.state_spec(_model(mesh), tx, mesh, _RULES)
  params = jax.tree.leaves(spec.abstract.params)
  shapes = {p.shape for p in params}
  for leaf in jax.tree.leaves(spec.abstract.opt_state):
    if leaf.shape not in shapes:
      assert leaf.sharding.is_fully_replicated
  jax.tree.map(
    lambda a, s: a.sharding == s or pytest.fail('spec disagrees'),
    spec.abstract,
    spec.shardings,
  )


def test_batch_shards():
  mesh = make_mesh('data=2,context=2,tensor=2')
  assert train_state_lib.batch_shards(mesh, _RULES) == (2, 2)
  assert train_state_lib.batch_shards(mesh, PRESETS['data_parallel']) == (8, 1)


def test_indivisible_parameter_is_named():
  mesh = make_mesh('tensor=8')
  with pytest.raises(ValueError, match='attention/key/kernel.*kv_heads'):
    train_state_lib.state_spec(_model(mesh), optax.sgd(1.0), mesh, _RULES)


def test_state_is_a_pytree_of_arrays():
  mesh = make_mesh()
  state = train_state_lib.init_state(_model(mesh), optax.sgd(1.0), mesh, _RULES)
  doubled = jax.tree.map(lambda x: x + x, state)
  assert isinstance(doubled, train_state_lib.TrainState)
  assert doubled.rng.dtype == jnp.uint32
