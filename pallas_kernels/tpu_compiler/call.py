"""A function and its abstract arguments, free of devices, to be sent away.

Shardings are kept as axis names: the devices they will be over exist only in
the process that compiles.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np


@dataclasses.dataclass(frozen=True)
class Argument:
  """Stands for an array.

  Attributes:
    shape: Its shape.
    dtype: Its dtype.
    spec: Over which mesh axes it is sharded, or `None`.
    value: Its value, where it is known.
  """

  shape: tuple[int, ...]
  dtype: Any
  spec: P | None = None
  value: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Call:
  """What to compile: called with the devices, gives something to lower.

  Attributes:
    fn: The function, not jitted.
    args: Pytrees of `Argument`; static ones as they are.
    mesh_axes: Names and sizes of the mesh's axes.
    jit_options: Keyword arguments of `jax.jit`, shardings as `PartitionSpec`s.
  """

  fn: Callable[..., Any]
  args: tuple[Any, ...]
  mesh_axes: Mapping[str, int]
  jit_options: Mapping[str, Any]

  def __call__(self, devices: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted function and its arguments on `devices`."""
    mesh = make_mesh(self.mesh_axes, devices)
    # Arguments that say nothing are replicated, unless in_shardings does.
    default = None if 'in_shardings' in self.jit_options else P()

    def abstract(leaf):
      if not isinstance(leaf, Argument):
        return leaf
      spec = default if leaf.spec is None else leaf.spec
      sharding = None if spec is None else NamedSharding(mesh, spec)
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    options = {
      name: _map_shardings(lambda spec: NamedSharding(mesh, spec), P, value)
      for name, value in self.jit_options.items()
    }
    args = tuple(jax.tree.map(abstract, arg) for arg in self.args)
    return jax.jit(self.fn, **options), args

  def values(self, args: Any = None) -> list[np.ndarray | None]:
    """Known values of the flattened arguments."""
    del args  # They are abstract.
    leaves = jax.tree.leaves(self.args)
    return [leaf.value for leaf in leaves if isinstance(leaf, Argument)]


def make_call(
  fn: Callable[..., Any],
  args: tuple[Any, ...],
  static: Mapping[str, Any],
  num_devices: int,
  mesh_axes: Mapping[str, int] | None,
  jit_options: Mapping[str, Any],
) -> Call:
  """Takes the devices out of a function's arguments and options.

  Args:
    fn: Function, jitted or not.
    args: Pytrees of `ShapeDtypeStruct`s and of arrays, whose values are kept.
    static: Keyword arguments that are not arrays.
    num_devices: How many there will be.
    mesh_axes: Names and sizes; `None` takes those of the first sharding.
    jit_options: 'in_shardings', 'out_shardings' and 'donate_argnums', those
      that were given.

  Raises:
    ValueError: Options for a function that is jitted already, a mesh of more
      devices than there are, meshes that disagree, or a sharding that is not
      named.
  """
  if hasattr(fn, 'lower'):
    if jit_options:
      raise ValueError(
        f'{", ".join(jit_options)}: the function is jitted already; give them '
        'to its jax.jit, or pass the function itself'
      )
    fn, jit_options = _without_jit(fn)
    # Those that are given by name are bound to the function below.
    jit_options['static_argnums'] = tuple(
      i for i in jit_options['static_argnums'] if i < len(args)
    )
  axes = _mesh_axes(args, jit_options, mesh_axes, num_devices)
  static_argnums = jit_options.get('static_argnums', ())
  return Call(
    functools.partial(fn, **static) if static else fn,
    tuple(
      arg if i in static_argnums else jax.tree.map(_argument, arg)
      for i, arg in enumerate(args)
    ),
    axes,
    {
      name: _map_shardings(lambda s: s.spec, NamedSharding, value)
      for name, value in jit_options.items()
    },
  )


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
  """A mesh of the first devices, neighbours on the mesh near in the network."""
  shape = tuple(axes.values())
  used = list(devices)[: math.prod(shape)]
  if len(used) == len(devices) > 1:
    grid = mesh_utils.create_device_mesh(
      shape, used, allow_split_physical_axes=True
    )
  else:
    grid = np.array(used, dtype=object).reshape(shape)
  return Mesh(grid, tuple(axes))


def _without_jit(jitted):
  """The function inside a jitted one, and its options; jit hides both."""
  fn = getattr(jitted, '__wrapped__', None)
  info = getattr(jitted, '_jit_info', None)
  if fn is None or info is None:
    raise ValueError(
      f'cannot look into {jitted}: pass the function itself, with its options'
    )
  options = dict(
    donate_argnums=info.donate_argnums,
    static_argnums=info.static_argnums,
    in_shardings=jax.tree.unflatten(
      info.in_shardings_treedef, info.in_shardings_leaves
    ),
    out_shardings=jax.tree.unflatten(
      info.out_shardings_treedef, info.out_shardings_leaves
    ),
    keep_unused=info.keep_unused,
  )
  shardings = ('in_shardings', 'out_shardings')
  return fn, {
    name: value
    for name, value in options.items()
    if name not in shardings
    or any(isinstance(s, NamedSharding) for s in _leaves(value))
  }


def _mesh_axes(args, jit_options, given, num_devices):
  """Names and sizes of the one mesh of everything that was given."""
  leaves = _leaves((args, dict(jit_options)))
  shardings = [getattr(leaf, 'sharding', leaf) for leaf in leaves]
  meshes = {
    tuple(s.mesh.shape.items())
    for s in shardings
    if isinstance(s, NamedSharding)
  }
  if given is not None:
    meshes.add(tuple(given.items()))
  if len(meshes) > 1:
    raise ValueError(
      f'one mesh is needed, got {" and ".join(str(dict(m)) for m in meshes)}'
    )
  axes = dict(meshes.pop()) if meshes else {'device': num_devices}
  if math.prod(axes.values()) > num_devices:
    raise ValueError(
      f'mesh {axes} needs {math.prod(axes.values())} devices, the topology has '
      f'{num_devices}'
    )
  return axes


def _is_sharding(x):
  return isinstance(x, NamedSharding | P)


def _leaves(tree):
  return jax.tree.leaves(tree, is_leaf=_is_sharding)


def _map_shardings(f, kind, tree):
  return jax.tree.map(
    lambda x: f(x) if isinstance(x, kind) else x, tree, is_leaf=_is_sharding
  )


def _argument(leaf):
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return Argument(leaf.shape, leaf.dtype, _spec(leaf.sharding))
  spec = None
  if isinstance(getattr(leaf, 'sharding', None), NamedSharding):
    spec = leaf.sharding.spec
  dtype = getattr(leaf, 'dtype', None)
  if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
    return Argument(leaf.shape, dtype, spec)  # Random keys have no value.
  value = np.asarray(leaf)
  dtype = jax.dtypes.canonicalize_dtype(value.dtype)
  return Argument(value.shape, dtype, spec, value.astype(dtype))


def _spec(sharding):
  if sharding is None:
    return None
  if not isinstance(sharding, NamedSharding):
    raise ValueError(f'only named shardings have axes to keep, got {sharding}')
  return sharding.spec
