"""Builds the parameter tree from a file, shard by shard.

Every device's shard is read by itself and put on its device before the next,
so that the host holds one shard and no device ever holds the model.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import SingleDeviceSharding
import numpy as np
import tqdm

from jaxtrain.checkpoints import layout
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import base
from jaxtrain.models.transformer import Transformer
from jaxtrain.sharding import ShardingRules
from jaxtrain.sharding import param_shardings
from jaxtrain.sharding.partition import abstract_params
from jaxtrain.sharding.partition import path_name

# Loads above this size show their progress.
PROGRESS_BYTES = 1 << 30
_SHOWN = 4


class Source(Protocol):
  """An open checkpoint.

  Attributes:
    where: What errors call it.
    shapes: Shape of every tensor of the decoder.
  """

  where: str
  shapes: Mapping[str, tuple[int, ...]]

  def dtype(self, name: str) -> np.dtype:
    """Dtype that `read` returns."""

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a rectangle of a tensor, no more."""


def load(
  config: ModelConfig,
  weight_map: base.WeightMap,
  source: Source,
  mesh: Mesh | None,
  rules: ShardingRules,
  param_dtype: Any = None,
) -> Any:
  """Reads all parameters onto their shards.

  Args:
    config: Architecture.
    weight_map: How each parameter is stored; the first way found is taken.
    source: Where.
    mesh: Devices; `None` is the first local device.
    rules: Which axis goes where.
    param_dtype: Dtype of the parameters; `None` keeps the stored ones.

  Returns:
    The parameter tree of `Transformer(config)`.

  Raises:
    ValueError: A missing, extra or misshapen tensor, or a dimension that the
      mesh does not divide.
  """
  sizes = base.dim_sizes(config)
  chosen = _choose(weight_map, source, sizes)
  check(chosen, source, sizes)
  shardings = _shardings(config, mesh, rules)
  paths = {path_name(p): p for p, _ in _leaves(shardings)}
  assert set(paths) == set(chosen), set(paths) ^ set(chosen)

  plans = []
  for path, leaf in _leaves(shardings):
    weight = chosen[path_name(path)]
    dtype = param_dtype or _stored_dtype(weight, source, sizes)
    shape = layout.param_shape(weight, sizes)
    plans.append((weight, leaf, shape, jnp.dtype(dtype)))
  total = sum(_bytes_here(plan) for plan in plans)
  with tqdm.tqdm(
    desc=f'Loading {source.where}',
    total=total,
    unit='B',
    unit_scale=True,
    disable=total < PROGRESS_BYTES or jax.process_index() > 0,
  ) as progress:
    arrays = [
      _load_param(plan, sizes, source, progress.update) for plan in plans
    ]
  return jax.tree.unflatten(jax.tree.structure(shardings), arrays)


def check(
  chosen: Mapping[str, base.Weight],
  source: Source,
  sizes: Mapping[str, int],
) -> None:
  """Checks names and shapes of all tensors before anything is read.

  Raises:
    ValueError: Names the tensors that are missing, misshapen or too many.
  """
  wanted = {}
  for weight in chosen.values():
    shape = layout.stored_shape(weight, sizes)
    wanted.update({n: shape for _, n in layout.stored_names(weight, sizes)})
  missing = [f'{n} {wanted[n]}' for n in wanted if n not in source.shapes]
  extra = [
    f'{n} {tuple(shape)}'
    for n, shape in source.shapes.items()
    if n not in wanted
  ]
  misshapen = [
    f'{n} has shape {tuple(source.shapes[n])}, wanted {shape}'
    for n, shape in wanted.items()
    if n in source.shapes and tuple(source.shapes[n]) != shape
  ]
  faults = []
  for kind, found in (
    ('missing tensors', missing),
    ('misshapen tensors', misshapen),
    ('tensors that the config has no place for', extra),
  ):
    if found:
      faults.append(f'{kind}: {_some(found)}')
  if faults:
    raise ValueError(f'{source.where}: {"; ".join(faults)}')


def _choose(weight_map, source, sizes):
  """Of the ways each parameter may be stored, the one in the file."""

  def first_name(weight):
    return next(layout.stored_names(weight, sizes))[1]

  return {
    path: next((w for w in ways if first_name(w) in source.shapes), ways[0])
    for path, ways in weight_map.items()
  }


def _shardings(config, mesh, rules):
  """Tree of the sharding of every parameter."""
  model = Transformer(config)
  tokens = jnp.zeros((1, 1), jnp.int32)
  boxed = abstract_params(lambda key: model.init(key, tokens))['params']
  if mesh is None:
    one = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: one, nn.unbox(boxed))
  return param_shardings(boxed, mesh, rules)


def _leaves(tree):
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def _devices_of(sharding, shape):
  """`{index: devices that hold it}` of this process."""
  devices = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    index = tuple(
      slice(*s.indices(size)) for s, size in zip(index, shape, strict=True)
    )
    key = tuple((s.start, s.stop) for s in index)
    devices.setdefault(key, (index, []))[1].append(device)
  return list(devices.values())


def _bytes_here(plan):
  """Bytes of the parameter that this process reads."""
  _, sharding, shape, dtype = plan
  shard = int(np.prod(sharding.shard_shape(shape)))
  return len(_devices_of(sharding, shape)) * shard * dtype.itemsize


def _load_param(plan, sizes, source, on_read):
  weight, sharding, shape, dtype = plan
  shards = {}
  for index, devices in _devices_of(sharding, shape):
    piece = layout.read(weight, sizes, index, source.read, dtype, on_read)
    shards.update({d: jax.device_put(piece, d) for d in devices})
  # In the order that the sharding lists its devices.
  ordered = [shards[d] for d in sharding.addressable_devices_indices_map(shape)]
  return jax.make_array_from_single_device_arrays(
    shape, sharding, ordered, dtype=dtype
  )


def _stored_dtype(weight, source, sizes):
  names = (n for _, n in layout.stored_names(weight, sizes))
  dtypes = sorted({source.dtype(n) for n in names}, key=str)
  out = dtypes[0]
  for dtype in dtypes[1:]:
    out = jnp.promote_types(out, dtype)
  return out


def _some(found: Iterable[str]) -> str:
  found = list(found)
  more = f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
  return ', '.join(found[:_SHOWN]) + more
