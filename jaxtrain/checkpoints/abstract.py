"""Shapes, dtypes and shardings of what a checkpoint holds or should become."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import SingleDeviceSharding

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding.partition import abstract_params
from jaxtrain.sharding.partition import path_name

_SHOWN = 4


def sharded_params(
  config: ModelConfig, mesh: Mesh | None, rules: ShardingRules
) -> Any:
  """Float32 `ShapeDtypeStruct`s of `Transformer(config)`, with shardings.

  Args:
    config: Architecture.
    mesh: Devices; `None` is the first local device.
    rules: Which axis goes where.

  Returns:
    Tree of the structure of the unboxed parameters.

  Raises:
    ValueError: A dimension that the mesh does not divide.
  """
  tokens = jnp.zeros((1, 1), jnp.int32)
  model = Transformer(config)
  boxed = abstract_params(lambda key: model.init(key, tokens))['params']
  params = nn.unbox(boxed)
  if mesh is None:
    one = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, params)
  else:
    shardings = param_shardings(boxed, mesh, rules)
  return jax.tree.map(
    lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
    params,
    shardings,
  )


def with_dtype(tree: Any, dtype: Any) -> Any:
  """`tree` with every leaf of `dtype`."""
  return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), tree)


def with_stored_dtypes(tree: Any, stored: dict[str, Any]) -> Any:
  """`tree` with the dtypes of the leaves of the same name, where there are."""

  def one(path, leaf):
    found = stored.get(path_name(path), leaf)
    return leaf.update(dtype=jnp.dtype(found.dtype))

  return jax.tree_util.tree_map_with_path(one, tree)


def leaves(tree: Any) -> dict[str, Any]:
  """`{'/'-joined path: leaf}`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in flat}


def without_keys(state: Any) -> Any:
  """`state` with random keys as the integers that they are.

  Raises:
    ValueError: With several processes, an array that only this one has.
  """

  def one(path, leaf):
    if not isinstance(leaf, jax.Array):
      return leaf
    if jax.process_count() > 1 and leaf.is_fully_addressable:
      raise ValueError(
        f'{path_name(path)} is an array of one process; put it on the mesh, '
        'replicated if need be'
      )
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf

  return jax.tree_util.tree_map_with_path(one, state)


def restorable(state: Any) -> tuple[Any, Callable[[Any], Any]]:
  """What to read for `state`, and the function that finishes what was read.

  Args:
    state: Tree of arrays or `ShapeDtypeStruct`s; random keys are allowed.

  Returns:
    Tree of `ShapeDtypeStruct`s without keys, and a function from the tree that
    was read to one of the structure and dtypes of `state`.
  """

  def one(leaf):
    if not hasattr(leaf, 'dtype'):
      return leaf
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(
      data.shape, data.dtype, sharding=getattr(leaf, 'sharding', None)
    )

  def finish(leaf, read):
    if not _is_key(leaf):
      return read
    return jax.random.wrap_key_data(read, impl=_key_impl(leaf))

  return jax.tree.map(one, state), lambda tree: jax.tree.map(
    finish, state, tree
  )


def check(
  wanted: Any, stored: dict[str, Any], where: str, partial: bool = False
) -> None:
  """Checks that a checkpoint holds what is wanted of it.

  Args:
    wanted: Tree of `ShapeDtypeStruct`s.
    stored: `leaves` of what the checkpoint says of itself.
    where: What errors call the checkpoint.
    partial: Whether it may hold more, and dtypes may differ.

  Raises:
    ValueError: Names the leaves that are missing, too many or misshapen.
  """
  wanted = leaves(wanted)
  faults = []
  if missing := [n for n in wanted if n not in stored]:
    faults.append(f'it lacks {_some(missing)}')
  if extra := [n for n in stored if n not in wanted and not partial]:
    faults.append(f'it also has {_some(extra)}')
  for name in wanted.keys() & stored.keys():
    want, have = wanted[name], stored[name]
    if not hasattr(want, 'shape') or not hasattr(have, 'shape'):
      continue
    if tuple(want.shape) != tuple(have.shape):
      faults.append(
        f'{name} has shape {tuple(have.shape)}, wanted {tuple(want.shape)}'
      )
    elif not partial and want.dtype != have.dtype:
      faults.append(f'{name} is {have.dtype}, wanted {want.dtype}')
  if faults:
    raise ValueError(f'{where} does not fit the state: {_some(faults, "; ")}')


def _is_key(leaf):
  dtype = getattr(leaf, 'dtype', None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _key_impl(leaf):
  impl = []
  jax.eval_shape(lambda k: impl.append(jax.random.key_impl(k)), leaf)
  return impl[0]


def _some(found, separator=', '):
  found = sorted(found)
  more = f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
  return separator.join(found[:_SHOWN]) + more
