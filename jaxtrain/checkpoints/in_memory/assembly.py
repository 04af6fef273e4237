"""Arrays out of pieces that keepers have, onto any sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints import abstract
from jaxtrain.checkpoints.in_memory import pieces
from jaxtrain.checkpoints.in_memory.pieces import Piece
from jaxtrain.checkpoints.in_memory.reader import LostError
from jaxtrain.checkpoints.in_memory.reader import Reader

_SHOWN = 4


def assemble(source: Reader, abstract_state: Any) -> Any:
  """Reads the state of a version.

  Args:
    source: Of the version.
    abstract_state: Tree of arrays or `ShapeDtypeStruct`s, keys allowed.

  Returns:
    Tree of the structure of `abstract_state`.

  Raises:
    ValueError: The version does not fit, or leaves of it are lost.
  """
  wanted, finish = abstract.restorable(abstract_state)
  stored = _stored(source)
  abstract.check(wanted, stored, f'snapshot of step {source.found.id[1]}')
  by_leaf: dict[str, list[tuple[int, Piece]]] = {}
  for member, header in source.headers.items():
    for name, rectangle, offset in header['pieces']:
      piece = Piece(name, tuple(map(tuple, rectangle)), offset)
      by_leaf.setdefault(name, []).append((member, piece))
  named = abstract.leaves(wanted)
  _fetch(source, named, stored, by_leaf)

  def one(path, leaf):
    name = abstract.path_name(path)
    held, found = by_leaf.get(name, []), stored[name]
    if getattr(leaf, 'sharding', None) is not None:
      return jax.make_array_from_callback(
        found.shape,
        leaf.sharding,
        lambda index: _paste(
          source, held, found, pieces.to_rectangle(index, found.shape)
        ),
      )
    whole = _paste(source, held, found, _whole(found))
    return whole if hasattr(leaf, 'dtype') else whole.item()

  return finish(jax.tree_util.tree_map_with_path(one, wanted))


def data_state(source: Reader) -> Any:
  """The data state of this process.

  Raises:
    ValueError: Another number of processes saved states that differ.
  """
  headers = source.headers.values()
  states = {h['process']: h['data_state'] for h in headers}
  count = next(iter(headers))['num_processes']
  if count == jax.process_count():
    return states[jax.process_index()]
  # Iterators over one global order all stand at the same place.
  if any(s != states[0] for s in states.values()):
    raise ValueError(
      f'snapshot of step {source.found.id[1]} has the data states of {count} '
      f'processes, which differ, and there are {jax.process_count()} now'
    )
  return states[0]


def _stored(source):
  leaves = source.headers[0]['leaves']
  return {
    name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    for name, (dtype, shape) in leaves.items()
  }


def _fetch(source, named, stored, by_leaf):
  """Reads what this process needs of all leaves."""
  ranges: dict[int, list[tuple[int, int]]] = {}
  for name, leaf in named.items():
    found = stored[name]
    for rectangle in _needed(leaf, found):
      for member, piece in by_leaf.get(name, ()):
        if both := pieces.intersect(rectangle, piece.rectangle):
          span = pieces.byte_range(piece, both, found.dtype.itemsize)
          ranges.setdefault(member, []).append(span)
  try:
    source.fetch(ranges)
  except LostError as e:
    lost = [
      name
      for name, held in by_leaf.items()
      for member, piece in held
      if member == e.member
      for a, b in [
        pieces.byte_range(piece, piece.rectangle, stored[name].dtype.itemsize)
      ]
      if a < e.stop and e.start < b
    ]
    more = f' and {len(lost) - _SHOWN} more' if len(lost) > _SHOWN else ''
    raise ValueError(
      f'snapshot of step {source.found.id[1]} has lost '
      f'{", ".join(lost[:_SHOWN])}{more}: {e}'
    ) from e


def _needed(leaf, found):
  """Distinct rectangles that this process's devices hold."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return {_whole(found)}
  indices = sharding.addressable_devices_indices_map(found.shape)
  return {pieces.to_rectangle(i, found.shape) for i in indices.values()}


def _whole(found):
  return tuple((0, n) for n in found.shape)


def _paste(source, held, found, rectangle):
  """The rectangle of an array, NumPy."""
  out = np.empty([b - a for a, b in rectangle], found.dtype)
  for member, piece in held:
    if (both := pieces.intersect(rectangle, piece.rectangle)) is None:
      continue
    stored = pieces.view(source.data[member], piece, found.dtype)
    out[pieces.within(both, rectangle)] = stored[
      pieces.within(both, piece.rectangle)
    ]
  return out
