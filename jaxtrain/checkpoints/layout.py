"""Moves one parameter between our layout and a checkpoint's.

A `Weight` describes both in words (`jaxtrain/models/families/base.py`). Reading
takes any rectangle of the parameter and touches only the tensors and rows that
it needs, so that a device's shard is read without the rest.
"""

from collections.abc import Callable, Iterator, Mapping
import itertools
import math
import re

import numpy as np

from jaxtrain.models.families import Weight

# Reads a rectangle of a stored tensor.
ReadTensor = Callable[[str, tuple[slice, ...]], np.ndarray]


def param_shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Shape of the parameter, all layers stacked."""
  return tuple(sizes[c] for c in weight.ours.split())


def stored_shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Shape of each stored tensor."""
  return tuple(
    math.prod(2 if c.isdigit() else sizes[c] for c in word)
    for word in weight.theirs.split()
  )


def stored_names(
  weight: Weight, sizes: Mapping[str, int]
) -> Iterator[tuple[tuple[int, ...], str]]:
  """Place in the leading dimensions, and name, of every stored tensor."""
  spread = _spread(weight)
  for place in itertools.product(*(range(sizes[c]) for c in spread)):
    yield place, _name(weight, spread, place)


def read(
  weight: Weight,
  sizes: Mapping[str, int],
  index: tuple[slice, ...],
  read_tensor: ReadTensor,
  dtype: np.dtype,
  on_read: Callable[[int], None] = lambda num_bytes: None,
) -> np.ndarray:
  """Reads the rectangle `index` of the parameter.

  Args:
    weight: The two layouts.
    sizes: Size of every letter.
    index: A slice of step 1 for each dimension of the parameter.
    read_tensor: Reads a rectangle of a stored tensor.
    dtype: Of the result.
    on_read: Called with the bytes of the result that are done.
  """
  letters = weight.ours.split()
  ranges = {
    c: range(*s.indices(sizes[c])) for c, s in zip(letters, index, strict=True)
  }
  spread = _spread(weight)
  if not spread:  # The largest, the embedding: spares a copy.
    piece = _read_piece(weight, sizes, ranges, read_tensor, weight.name)
    piece = np.ascontiguousarray(piece, dtype)
    on_read(piece.nbytes)
    return piece
  out = np.empty([len(ranges[c]) for c in letters], dtype)
  for place in itertools.product(*(ranges[c] for c in spread)):
    piece = _read_piece(
      weight, sizes, ranges, read_tensor, _name(weight, spread, place)
    )
    at = tuple(p - ranges[c].start for p, c in zip(place, spread, strict=True))
    out[at] = piece
    on_read(out[at].nbytes)
  return out


def to_stored(weight: Weight, piece: np.ndarray) -> np.ndarray:
  """One stored tensor from the parameter's slice `piece` at a place.

  Args:
    weight: The two layouts; nothing of it may be halved or interleaved.
    piece: The parameter without its leading, spread dimensions.
  """
  letters = weight.ours.split()[len(_spread(weight)) :]
  words = weight.theirs.split()
  order = [letters.index(c) for c in ''.join(words)]
  sizes = dict(zip(letters, piece.shape, strict=True))
  shape = [math.prod(sizes[c] for c in word) for word in words]
  return np.ascontiguousarray(piece.transpose(order).reshape(shape))


def _read_piece(weight, sizes, ranges, read_tensor, name):
  """The wanted part of one stored tensor, in our order of dimensions."""
  words = weight.theirs.split()
  slices, read_sizes, rest = [], [], []
  for word in words:
    half, lead, tail = re.fullmatch(r'(\d?)(\w)(\w*)', word).groups()
    # Only the slowest letter of a word is cut while reading: rows stay whole.
    wanted = ranges[lead]
    if lead == 'H' and weight.is_interleaved:
      rest.append(slice(wanted.start, wanted.stop))
      wanted = range(sizes['H'])
    else:
      rest.append(slice(None))
    row = math.prod(sizes[c] for c in tail)
    start = int(half or 0) * sizes[lead] + wanted.start
    slices.append(slice(start * row, (start + len(wanted)) * row))
    read_sizes.append(len(wanted))
    for c in tail:
      read_sizes.append(sizes[c])
      rest.append(slice(ranges[c].start, ranges[c].stop))
  order = [c for c in ''.join(words) if not c.isdigit()]
  x = read_tensor(name, tuple(slices)).reshape(read_sizes)
  if weight.is_interleaved:
    x = _deinterleave(x, order.index('H'))
  x = x[tuple(rest)]
  ours = weight.ours.split()[len(_spread(weight)) :]
  x = x.transpose([order.index(c) for c in ours])
  return x - np.asarray(weight.plus, x.dtype) if weight.plus else x


def _deinterleave(x, axis):
  """Turns pairs (i, i + H/2) side by side into two halves."""
  shape = x.shape
  split = (*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
  return x.reshape(split).swapaxes(axis, axis + 1).reshape(shape)


def _spread(weight):
  return re.findall(r'\{(\w)\}', weight.name)


def _name(weight, spread, place):
  return weight.name.format(**dict(zip(spread, place, strict=True)))
