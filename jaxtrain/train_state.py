"""What a training step reads and writes, and where on the mesh it lives."""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, UInt32
import optax

from jaxtrain.sharding.partition import param_shardings
from jaxtrain.sharding.partition import path_name
from jaxtrain.sharding.rules import ShardingRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """State of training: a pytree, saved and restored as a whole.

  Attributes:
    step: Updates made so far, int32.
    params: Parameters, unboxed.
    opt_state: State of the optax transformation.
    rng: Key data of the run's random key; a step uses it folded with its
      number.
  """

  step: Int[Array, '']
  params: Any
  opt_state: Any
  rng: UInt32[Array, '2']


@dataclasses.dataclass(frozen=True)
class StateSpec:
  """Shapes and shardings of a `TrainState`, without its arrays.

  Attributes:
    abstract: `TrainState` of `ShapeDtypeStruct`s that carry their shardings;
      what `CheckpointManager.restore` takes.
    shardings: The shardings alone.
  """

  abstract: TrainState
  shardings: TrainState


# Kept, for tracing a model takes a good part of a second.
@functools.lru_cache(maxsize=8)
def state_spec(
  model: nn.Module,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules,
) -> StateSpec:
  """Derives where every leaf of the state lives from the parameters' axes.

  A leaf of the optimizer state that mirrors a parameter (its path ends with the
  parameter's, its shape is the same) is sharded like it; every other one is
  replicated.

  Args:
    model: Module called as `Transformer` is, parameters boxed with their axes.
    tx: Optimizer.
    mesh: Where the state will live.
    rules: Logical to mesh axes.

  Raises:
    ValueError: A parameter dimension that its mesh axes do not divide.
  """

  def boxed_init(key):
    return _boxed_params(model, mesh, rules, key)

  key = jax.random.key(0)
  params = param_shardings(jax.eval_shape(boxed_init, key), mesh, rules)
  shapes = jax.eval_shape(_initializer(model, tx, mesh, rules), key)
  replicated = NamedSharding(mesh, P())
  shardings = TrainState(
    step=replicated,
    params=params,
    opt_state=_mirror(shapes.opt_state, shapes.params, params, replicated),
    rng=replicated,
  )
  abstract = jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  return StateSpec(abstract, shardings)


def init_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: ShardingRules,
  *,
  seed: int = 0,
) -> TrainState:
  """Makes the first state, every leaf born on its shards.

  The values depend on `seed` only, not on the mesh.

  Args:
    model: As for `state_spec`.
    tx: Optimizer.
    mesh: Where the state will live.
    rules: Logical to mesh axes.
    seed: Of parameters and of the run's random key.
  """
  spec = state_spec(model, tx, mesh, rules)
  init = _initializer(model, tx, mesh, rules)
  key = jax.random.key(seed, impl='threefry2x32')
  return jax.jit(init, out_shardings=spec.shardings)(key)


def batch_shards(mesh: Mesh, rules: ShardingRules) -> tuple[int, int]:
  """Over how many shards the rules split batch and sequence."""
  return tuple(
    math.prod(mesh.shape[a] for a in rules.table.get(name, ()))
    for name in ('batch', 'seq')
  )


def _boxed_params(model, mesh, rules, key):
  # The smallest batch that the mesh can split.
  tokens = jnp.zeros(batch_shards(mesh, rules), jnp.int32)
  return model.init(key, tokens)['params']


def _initializer(model, tx, mesh, rules):
  def init(key):
    params_key, run_key = jax.random.split(key)
    params = nn.unbox(_boxed_params(model, mesh, rules, params_key))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=tx.init(params),
      rng=jax.random.key_data(run_key),
    )

  return init


def _mirror(opt_state, params, shardings, otherwise):
  """Shardings of `opt_state` from those of the parameters it mirrors."""
  by_path = {
    path_name(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(shardings),
      strict=True,
    )
  }

  def one(path, leaf):
    names = path_name(path).split('/')
    for start in range(len(names)):
      shape, sharding = by_path.get('/'.join(names[start:]), (None, None))
      if shape == leaf.shape:
        return sharding
    return otherwise

  return jax.tree_util.tree_map_with_path(one, opt_state)
