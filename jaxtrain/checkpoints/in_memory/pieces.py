"""Which keeper gets which rectangle of which array.

Every process computes the same answer from the shardings alone. An array that
several processes hold is cut among them (the sharded snapshots of the paper
that `keeper` names): parity protects one copy, a second would be for nothing.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64
_MIN_CUT_BYTES = 1 << 16  # Smaller rectangles are not worth cutting.

Rectangle = tuple[tuple[int, int], ...]  # Start and stop of each dimension.


@dataclasses.dataclass(frozen=True)
class Piece:
  """A rectangle of a leaf, and where its bytes are.

  Attributes:
    leaf: Name.
    rectangle: Of the global array.
    offset: Of its first byte among the keeper's; rows follow each other.
  """

  leaf: str
  rectangle: Rectangle
  offset: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where everything goes.

  Attributes:
    leaves: `{name: (dtype name, global shape)}`.
    pieces: Of each keeper.
    num_bytes: Of each keeper.
  """

  leaves: dict[str, tuple[str, tuple[int, ...]]]
  pieces: tuple[tuple[Piece, ...], ...]
  num_bytes: tuple[int, ...]


def owners(num_keepers: int, num_processes: int) -> list[int]:
  """The process that feeds each keeper.

  Raises:
    ValueError: Processes do not divide keepers.
  """
  if num_processes < 1 or num_keepers % num_processes:
    raise ValueError(
      f'{num_keepers} keepers for {num_processes} processes: every process '
      'needs as many keepers as the others, one or more'
    )
  return [i * num_processes // num_keepers for i in range(num_keepers)]


def make_layout(
  leaves: dict[str, Any],
  owner_of: Sequence[int],
  process_of: Callable[[jax.Device], int] = lambda d: d.process_index,
) -> Layout:
  """Gives every distinct shard to the keepers of the processes that hold it.

  Args:
    leaves: `{name: array}`; what is no `jax.Array` goes to process 0.
    owner_of: Process of each keeper.
    process_of: Process of each device.
  """
  sizes = [0] * len(owner_of)
  pieces = [[] for _ in owner_of]
  for name, leaf in leaves.items():
    itemsize = jnp.dtype(leaf.dtype).itemsize
    for rectangle, processes in _shards(leaf, process_of).items():
      takers = [k for k, p in enumerate(owner_of) if p in processes]
      takers.sort(key=lambda k: sizes[k])
      for taker, cut in zip(
        takers, _cut(rectangle, len(takers), itemsize), strict=False
      ):
        pieces[taker].append(Piece(name, cut, sizes[taker]))
        num_bytes = itemsize * math.prod(b - a for a, b in cut)
        sizes[taker] += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
  described = {
    name: (jnp.dtype(leaf.dtype).name, tuple(leaf.shape))
    for name, leaf in leaves.items()
  }
  return Layout(described, tuple(map(tuple, pieces)), tuple(sizes))


def to_rectangle(index: tuple[slice, ...], shape: tuple[int, ...]) -> Rectangle:
  """Slices of step 1 as numbers."""
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def intersect(a: Rectangle, b: Rectangle) -> Rectangle | None:
  """What two rectangles have in common, `None` if nothing."""
  both = tuple(
    (max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True)
  )
  return None if any(start >= stop for start, stop in both) else both


def within(part: Rectangle, whole: Rectangle) -> tuple[slice, ...]:
  """Slices of an array of `whole` that are `part`."""
  return tuple(
    slice(a - start, b - start)
    for (a, b), (start, _) in zip(part, whole, strict=True)
  )


def byte_range(piece: Piece, part: Rectangle, itemsize: int) -> tuple[int, int]:
  """Start and stop among the keeper's bytes of what covers `part`."""
  first = last = 0
  for (a, b), (start, stop) in zip(part, piece.rectangle, strict=True):
    first = first * (stop - start) + a - start
    last = last * (stop - start) + b - 1 - start
  return (
    piece.offset + first * itemsize,
    piece.offset + (last + 1) * itemsize,
  )


def view(data: np.ndarray, piece: Piece, dtype: np.dtype) -> np.ndarray:
  """The piece among the bytes of its keeper, without a copy."""
  shape = [b - a for a, b in piece.rectangle]
  num_bytes = dtype.itemsize * math.prod(shape)
  part = data[piece.offset : piece.offset + num_bytes]
  return part.view(dtype).reshape(shape)


def _shards(leaf, process_of):
  """Processes by distinct rectangle, in one order everywhere."""
  if not isinstance(leaf, jax.Array):
    return {tuple((0, n) for n in leaf.shape): {0}}
  found = {}
  indices = leaf.sharding.devices_indices_map(leaf.shape)
  for device, index in indices.items():
    rectangle = to_rectangle(index, leaf.shape)
    found.setdefault(rectangle, set()).add(process_of(device))
  return dict(sorted(found.items()))


def _cut(rectangle, count, itemsize):
  """At most `count` parts, about as large, along the first long dimension."""
  lengths = [b - a for a, b in rectangle]
  num_bytes = itemsize * math.prod(lengths)
  if not num_bytes:
    return []
  count = min(count, max(1, num_bytes // _MIN_CUT_BYTES))
  dim = next((d for d, n in enumerate(lengths) if n >= count), None)
  if count == 1 or dim is None:
    return [rectangle]
  start, length = rectangle[dim][0], lengths[dim]
  edges = [start + i * length // count for i in range(count + 1)]
  return [
    (*rectangle[:dim], (a, b), *rectangle[dim + 1 :])
    for a, b in zip(edges[:-1], edges[1:], strict=True)
  ]
