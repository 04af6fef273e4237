"""Redco: tensor-parallel rules for a parameter tree nobody annotated.

Tan et al., "RedCoast: A Lightweight Tool to Automate Distributed Training of
LLMs on Any GPU/TPUs", https://arxiv.org/abs/2310.16355. Two rules suffice for
transformers: (1) consecutive linear layers alternate between splitting their
output and their input dimension; (2) in attention, the projections to queries,
keys and values split their output, the one back to the model its input. Each
pair then costs one all-reduce. Embeddings split the vocabulary, and so does the
output head.

Both rules are one here: in a group of layers (layer_groups.py), those that
leave the model width split the dimension they lead to, and those that return
split the dimension they come from.

Deviations: the authors' code reads the roles off the names ('q', 'out', 'wi')
and alternates over the other names in alphabetical order, we read shapes first.
Where a dimension does not divide it splits another one; we leave the whole
group replicated. We also replicate embeddings other than the vocabulary's
(positions, token types, relative biases), routers, and layers without a
partner, whose splitting would add a collective.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import PartitionSpec as P

from jaxtrain.sharding import layer_groups
from jaxtrain.sharding.mesh import AXES
from jaxtrain.sharding.partition import path_name

_KEYS_AND_VALUES = {'k', 'v', 'kv', 'key', 'value'}


def infer_rules(
  params: Any, num_shards: int, axis: str = 'tensor'
) -> dict[str, P]:
  """Tensor-parallel PartitionSpecs for a parameter tree nobody annotated.

  Args:
    params: Any nested dict of arrays or ShapeDtypeStructs, as Flax makes them.
    num_shards: Size of the mesh axis. A dimension that it does not divide stays
      whole, and so does the rest of its group. Kernels in which heads and head
      dimension are one hide the number of heads: splitting a head in two is
      right but slow, so choose a divisor of the number of heads.
    axis: Mesh axis to split over.

  Returns:
    `{'/'-joined path: PartitionSpec}` for every leaf, as long as its shape.

  Raises:
    ValueError: An unknown axis, `num_shards` below 1, or a tree without a
      matrix.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(params))
  shapes = {path_name(path): tuple(leaf.shape) for path, leaf in flat}
  return partition(shapes, num_shards, axis)


def partition(
  shapes: Mapping[str, tuple[int, ...]], num_shards: int, axis: str
) -> dict[str, P]:
  """`infer_rules` for a flat tree: '/'-joined path -> shape."""
  if axis not in AXES:
    raise ValueError(f'unknown mesh axis {axis!r}; known: {", ".join(AXES)}')
  if num_shards < 1:
    raise ValueError(f'num_shards={num_shards} must be at least 1')
  paths = {name: tuple(name.split('/')) for name in shapes}
  stacked = layer_groups.stacked_dims({paths[n]: s for n, s in shapes.items()})
  leaves = [
    layer_groups.Leaf(paths[name], tuple(shape)[stacked[paths[name]] :])
    for name, shape in shapes.items()
  ]
  split = _split_dims(leaves, num_shards)
  specs = {}
  for name, shape in shapes.items():
    dim = split.get(paths[name])
    at = None if dim is None else stacked[paths[name]] + dim
    specs[name] = P(*(axis if i == at else None for i in range(len(shape))))
  return specs


def _split_dims(leaves, num_shards):
  """{path: dimension to split, of the unstacked shape}."""
  tables = [x for x in leaves if x.is_table]
  matrices = [x for x in leaves if x.is_matrix]
  if not matrices and not tables:
    raise ValueError(
      'no parameter is a matrix, so there is nothing to split: '
      f'{["/".join(x.path) for x in leaves]}'
    )
  vocab = max((x.shape[0] for x in tables), default=None)
  split = {x.path: 0 for x in tables if x.shape[0] == vocab}
  grouped = set()
  for group in layer_groups.find_groups(leaves, vocab):
    split |= _split_group(group, num_shards)
    grouped |= {*group.opening, *group.closing}
  for x in matrices:
    if x not in grouped and x.shape[-1] == vocab != x.shape[0]:
      split[x.path] = len(x.shape) - 1
  sizes = {x.path: x.shape for x in leaves}
  split = {p: d for p, d in split.items() if sizes[p][d] % num_shards == 0}
  return split | _biases(sizes, split)


def _split_group(group, num_shards):
  """The dimension that each layer of a group splits, or none if one cannot."""
  if any(x.shape[d[0]] % num_shards for x, d in group.closing.items()):
    return {}
  split = {x.path: dims[0] for x, dims in group.closing.items()}
  closed = {x.size(dims) for x, dims in group.closing.items()}
  heads = {x.shape[dims[0]] for x, dims in group.closing.items()}
  for x, dims in group.opening.items():
    # Keys and values of grouped queries are narrower. What else does not match
    # is a router.
    matches = any(x.size(dims) % c == 0 for c in closed)
    if matches or layer_groups.tokens(x.path[-2:]) & _KEYS_AND_VALUES:
      same = [d for d in dims if x.shape[d] in heads]
      split[x.path] = (same or dims)[0]
  return split


def _biases(sizes, split):
  """Biases follow the dimensions of their kernel that they are added to."""
  found = {}
  for path, shape in sizes.items():
    kernel = (*path[:-1], 'kernel' if path[-1] == 'bias' else 'w')
    if path[-1] not in ('bias', 'b') or kernel not in split:
      continue
    kernel_shape, n = sizes[kernel], len(shape)
    if kernel_shape[-n:] == shape:
      at = split[kernel] - (len(kernel_shape) - n)
      if at >= 0:  # Below: the kernel splits its input, the bias stays whole.
        found[path] = at
    elif kernel_shape[:n] == shape and split[kernel] < n:
      found[path] = split[kernel]  # The kernel is stored as [out, in].
  return found
