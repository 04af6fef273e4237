"""Arrays that are read when asked, and then only the rectangle asked for.

A `View` is an array that nobody has read yet: a stored one, or one made of
others by moving, cutting and joining. Its rectangles are made of rectangles of
what it is made of, down to the file, so that a device's shard of a result costs
the reading of what that shard needs.

What is read beyond that: behind a `reshape`, whole rows, where the rectangle
cuts the inner of several dimensions that were or become one.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, Protocol

import numpy as np

# A slice of step 1 for each dimension, start and stop given.
Index = tuple[slice, ...]


class View(Protocol):
  """An array not yet read.

  Attributes:
    shape: Of the whole.
    dtype: NumPy's, or an extension of it such as bfloat16.
    parts: Views that it is made of; none if it is stored.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: tuple['View', ...]

  def read(self, index: Index) -> np.ndarray:
    """Reads a rectangle."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
  """An array in a file or in memory, known by its name."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Index], np.ndarray]
  parts: tuple[View, ...] = ()

  def read(self, index: Index) -> np.ndarray:
    """Reads a rectangle."""
    return self.fetch(index)


@dataclasses.dataclass(frozen=True, eq=False)
class _Made:
  """A view made of others; `make` reads them for a rectangle of it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: tuple[View, ...]
  make: Callable[[Index], np.ndarray]

  def read(self, index: Index) -> np.ndarray:
    """Reads a rectangle."""
    return self.make(index)


def whole(shape: Sequence[int]) -> Index:
  """The rectangle that is everything."""
  return tuple(slice(0, size) for size in shape)


def in_memory(name: str, array: Any) -> View:
  """A view of a NumPy array."""
  array = np.asarray(array)
  return Stored(name, array.shape, array.dtype, lambda index: array[index])


def sources(view: View) -> list[Stored]:
  """The stored arrays that a view is made of, each once."""
  if isinstance(view, Stored):
    return [view]
  found = {id(s): s for part in view.parts for s in sources(part)}
  return list(found.values())


def transpose(view: View, order: Sequence[int]) -> View:
  """Dimension i of the result is dimension `order[i]` of the view."""
  back = np.argsort(order)

  def make(index):
    return view.read(tuple(index[i] for i in back)).transpose(order)

  shape = tuple(view.shape[i] for i in order)
  return _Made(shape, view.dtype, (view,), make)


def cut(view: View, dim: int, start: int, stop: int) -> View:
  """`[start, stop)` of a dimension."""

  def make(index):
    moved = slice(index[dim].start + start, index[dim].stop + start)
    return view.read(_replaced(index, dim, moved))

  return _Made(
    _replaced(view.shape, dim, stop - start), view.dtype, (view,), make
  )


def join(views: Sequence[View], dim: int) -> View:
  """One after the other along a dimension; other sizes and dtypes agree."""
  views = tuple(views)
  ends = np.cumsum([v.shape[dim] for v in views]).tolist()
  first = views[0]

  def make(index):
    wanted, pieces = index[dim], []
    for view, end in zip(views, ends, strict=True):
      begin = end - view.shape[dim]
      start, stop = max(wanted.start, begin), min(wanted.stop, end)
      if start < stop:
        own = slice(start - begin, stop - begin)
        pieces.append(view.read(_replaced(index, dim, own)))
    if len(pieces) == 1:
      return pieces[0]
    if not pieces:
      return np.empty(_sizes(index), first.dtype)
    return np.concatenate(pieces, axis=dim)

  shape = _replaced(first.shape, dim, ends[-1])
  return _Made(shape, first.dtype, views, make)


def pad(view: View, dim: int, size: int, value: float) -> View:
  """Filled up with `value` at the end of a dimension."""
  here = view.shape[dim]

  def make(index):
    wanted = index[dim]
    stop = max(wanted.start, min(wanted.stop, here))
    out = np.full(_sizes(index), value, view.dtype)
    if stop > wanted.start:
      inside = view.read(_replaced(index, dim, slice(wanted.start, stop)))
      out[(slice(None),) * dim + (slice(0, stop - wanted.start),)] = inside
    return out

  return _Made(_replaced(view.shape, dim, size), view.dtype, (view,), make)


def cast(view: View, dtype: Any) -> View:
  """In another dtype, rounded to the nearest."""
  dtype = np.dtype(dtype)
  return _Made(
    view.shape, dtype, (view,), lambda index: view.read(index).astype(dtype)
  )


def scale(view: View, factor: float) -> View:
  """Times a factor, computed in float32 at least."""
  wide = np.float32 if view.dtype.itemsize <= 4 else view.dtype

  def make(index):
    x = view.read(index).astype(wide)
    return (x * np.asarray(factor, wide)).astype(view.dtype)

  return _Made(view.shape, view.dtype, (view,), make)


def repeat(view: View, count: int) -> View:
  """`count` copies along a new first dimension."""

  def make(index):
    return np.repeat(view.read(index[1:])[None], _sizes(index)[0], axis=0)

  return _Made((count, *view.shape), view.dtype, (view,), make)


def reshape(view: View, shape: Sequence[int]) -> View:
  """The same elements, in order, with other dimensions of the same size."""
  shape = tuple(shape)
  groups = _groups(view.shape, shape)

  def make(index):
    sizes = _sizes(index)
    if not math.prod(sizes):
      return np.empty(sizes, view.dtype)
    covers, picks = [], []
    for old, new in groups:
      wanted = _flat(shape[new], index[new])
      cover, first = _cover(view.shape[old], wanted[0], wanted[-1])
      covers += cover
      picks.append((wanted - first, math.prod(_sizes(cover))))
    x = view.read(tuple(covers)).reshape([size for _, size in picks])
    for axis, (wanted, size) in enumerate(picks):
      if len(wanted) != size:
        x = np.take(x, wanted, axis)
    return x.reshape(sizes)

  return _Made(shape, view.dtype, (view,), make)


def _replaced(values, dim, value):
  return (*values[:dim], value, *values[dim + 1 :])


def _sizes(index):
  return tuple(s.stop - s.start for s in index)


def _groups(old, new):
  """Pairs of slices of dimensions of `old` and `new` with equal products."""
  if not math.prod(old):
    return [(slice(0, len(old)), slice(0, len(new)))]
  groups, i, j = [], 0, 0
  while i < len(old) or j < len(new):
    i_end, j_end = min(i + 1, len(old)), min(j + 1, len(new))
    while (a := math.prod(old[i:i_end])) != (b := math.prod(new[j:j_end])):
      i_end, j_end = (i_end + 1, j_end) if a < b else (i_end, j_end + 1)
    groups.append((slice(i, i_end), slice(j, j_end)))
    i, j = i_end, j_end
  return groups


def _flat(shape, index):
  """Places of a rectangle's elements in the flattened array, ascending."""
  places = np.zeros(1, np.int64)
  for size, s in zip(shape, index, strict=True):
    places = (places[:, None] * size + np.arange(s.start, s.stop)).reshape(-1)
  return places


def _cover(shape, low, high):
  """Smallest run of whole rows with places `low` to `high`, and its first."""
  cover, first = [], 0
  stride = math.prod(shape)
  is_split = False
  for size in shape:
    stride //= size
    if is_split:
      cover.append(slice(0, size))
      continue
    start, stop = int(low // stride % size), int(high // stride % size)
    is_split = start != stop
    cover.append(slice(start, stop + 1))
    first += start * stride
  return cover, first
