"""Elementwise updates in place, and sums of their results, in one pass.

What an optimizer with a ratio per layer does to a leaf: new moments, and norms
of the step they make. On accelerators this is said plainly, and XLA makes it
one fusion with several results.

XLA for CPUs has none such: it writes the step to memory for its norm, a fresh
buffer of the leaf's size whose pages the kernel has to find and clear in every
step (about half of LAMB's time), or computes it an element at a time. So
there a large leaf is taken block by block in a loop: what a block's moments are
computed from is still in the cache when its norms are, and nothing of the
leaf's size is written but the moments. Three things make XLA do so:

* In a loop, a slice that is read, computed with and written back by one fusion
  is written in place, if that fusion is all that reads it.
* A slice of other bounds than the one just written is read from memory, not
  computed again. So every group of stages takes a block in twice as many parts
  as the one before, and the sums in `_PARTS`.
* Sums are added up elementwise, to accumulators of a part's size, so that
  neither XLA nor LLVM sees a reduction.
"""

from collections.abc import Callable, Mapping, Sequence
import math

import jax
import jax.numpy as jnp

# Elements of a block, at least: 128 KiB of float32 an array. Smaller ones cost
# more turns of the loop, and larger ones leave the second-level cache.
_BLOCK = 2**15
# More parts are more streams at distances of a power of two, which evict each
# other; fewer make accumulators that XLA gives to several threads.
_PARTS = 4
# Leaves of fewer elements fit in the cache as a whole.
_SMALL = 2**20

Arrays = Mapping[str, jax.Array]
Terms = Callable[[Arrays], jax.Array]


def sweep(
  stages: Sequence[Mapping[str, Terms]],
  sums: Mapping[str, Terms],
  kept: Arrays,
  given: Arrays,
  first: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """New arrays, and sums over each layer of what is made of them.

  Args:
    stages: Groups of functions, by name in `kept`: each takes all arrays by
      name, or the same part of all, and returns the new one, elementwise. A
      group sees what the groups before it returned, and not its own; two
      groups at most.
    sums: Functions of the arrays after all stages: float32 terms, elementwise.
    kept: Arrays of one shape that are replaced; they keep their dtype.
    given: Arrays of this shape that are only read.
    first: Sums are over this dimension and those behind it.

  Returns:
    New arrays by the names of `kept`, and float32 sums with dimensions of
    size 1 by the names of `sums`.

  Raises:
    ValueError: More than two groups of stages.
  """
  if 2 ** len(stages) > _PARTS:
    raise ValueError(f'{len(stages)} groups of stages, two are allowed')
  plain = lambda kept, given: _plain(stages, sums, kept, given, first)
  rows = _rows({**kept, **given}, first)
  if rows is None:
    return plain(dict(kept), dict(given))

  def in_blocks(kept, given):
    return _in_blocks(stages, sums, kept, given, first, rows)

  return jax.lax.platform_dependent(
    dict(kept), dict(given), cpu=in_blocks, default=plain
  )


def _plain(stages, sums, kept, given, first):
  for group in stages:
    kept = kept | _group(group, kept, given)
  every = given | kept
  axes = tuple(range(first, next(iter(every.values())).ndim))
  return kept, {
    name: jnp.sum(f(every), axis=axes, keepdims=True)
    for name, f in sums.items()
  }


def _group(group, kept, given):
  every = given | kept
  return {name: f(every).astype(kept[name].dtype) for name, f in group.items()}


def _rows(arrays, first):
  """Of dimension `first` in a block, or `None` where the leaf is one block."""
  shape = next(iter(arrays.values())).shape
  size = math.prod(shape)
  if size < _SMALL or len(shape) < first + 2:
    return None
  num = shape[first]
  fits = [
    n
    for n in range(_PARTS, num // 2 + 1, _PARTS)
    if num % n == 0 and n * (size // num) >= _BLOCK
  ]
  return min(fits, default=None)


def _in_blocks(stages, sums, kept, given, first, rows):
  num_blocks = next(iter((kept | given).values())).shape[first] // rows

  def part(arrays, start, size):
    return {
      name: jax.lax.dynamic_slice_in_dim(x, start, size, first)
      for name, x in arrays.items()
    }

  def body(i, carry):
    kept, totals = carry
    for level, group in enumerate(stages):
      size = rows // 2**level
      for start in (i * rows + j * size for j in range(2**level)):
        new = _group(group, part(kept, start, size), part(given, start, size))
        for name, x in new.items():
          kept[name] = jax.lax.dynamic_update_slice_in_dim(
            kept[name], x, start, first
          )
    size = rows // _PARTS
    for start in (i * rows + j * size for j in range(_PARTS)):
      every = part(given, start, size) | part(kept, start, size)
      totals = {name: totals[name] + f(every) for name, f in sums.items()}
    return kept, totals

  of_part = jax.eval_shape(
    lambda kept, given: part(given | kept, 0, rows // _PARTS), kept, given
  )
  zeros = {
    name: jnp.zeros(jax.eval_shape(f, of_part).shape, jnp.float32)
    for name, f in sums.items()
  }
  kept, totals = jax.lax.fori_loop(0, num_blocks, body, (dict(kept), zeros))
  axes = tuple(range(first, next(iter(of_part.values())).ndim))
  return kept, {
    name: jnp.sum(x, axis=axes, keepdims=True) for name, x in totals.items()
  }
