"""Copies this process's part of a state to its keepers."""

from collections.abc import Sequence
from concurrent import futures
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory import pieces
from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.feed import Feed
from jaxtrain.checkpoints.in_memory.stripes import Stripes
from jaxtrain.checkpoints.in_memory.versions import Group


class Writer:
  """Writes versions, one at a time.

  Args:
    keepers: Of all processes.
    num_parity: Rows of parity.
    generation: Of the versions.
    timeout_s: For each answer.
  """

  def __init__(
    self,
    keepers: Sequence[str],
    num_parity: int,
    generation: int,
    timeout_s: float,
  ):
    self._keepers = tuple(keepers)
    self._num_parity = num_parity
    self._generation = generation
    self._owner_of = pieces.owners(len(keepers), jax.process_count())
    self._feeds = {
      i: Feed(address, timeout_s)
      for i, address in enumerate(keepers)
      if self._owner_of[i] == jax.process_index()
    }
    self._plan: tuple[Any, Any, Any] | None = None

  def write(
    self, step: int, leaves: dict[str, Any], about: dict[str, Any]
  ) -> dict[str, Any]:
    """Writes a version and waits until it counts.

    Args:
      step: Number.
      leaves: `{name: array}`, copies that nobody overwrites.
      about: To keep with it, JSON types.

    Returns:
      See `Feed.end`.

    Raises:
      ValueError: A keeper has a later version.
    """
    layout, sources = self._planned(leaves)
    stripes = Stripes(len(self._keepers), self._num_parity)
    group = Group(
      self._keepers,
      self._num_parity,
      stripes.chunk_bytes(max(layout.num_bytes)),
    )
    version_id = (self._generation, step)
    for leaf in leaves.values():
      # JAX makes this list at the first call, and another thread that calls
      # meanwhile may see, and keep, a part of it.
      getattr(leaf, 'addressable_shards', None)
    with futures.ThreadPoolExecutor(len(self._feeds)) as pool:
      # Together, for a version counts when all members have it.
      jobs = [
        pool.submit(
          self._feed, i, version_id, group, layout, sources[i], leaves, about
        )
        for i in self._feeds
      ]
      try:
        results = [job.result() for job in jobs]
      except wire.RefusedError as e:
        raise ValueError(str(e)) from e
    return {
      'is_committed': all(r['is_committed'] for r in results),
      'absent': {k: v for r in results for k, v in r['absent'].items()},
      'reason': next((r['reason'] for r in results if r['reason']), None),
    }

  def check(self) -> None:
    """Raises `ValueError` if a keeper of this process is on another host."""
    for feed in self._feeds.values():
      feed.check()

  def close(self) -> None:
    """Closes connections."""
    for feed in self._feeds.values():
      feed.close()

  def _feed(self, index, version_id, group, layout, sources, leaves, about):
    feed = self._feeds[index]
    data = feed.begin(version_id, group, index)
    used = layout.num_bytes[index]
    for piece, shard, slices in sources:
      leaf = leaves[piece.leaf]
      if shard is not None:
        leaf = np.asarray(leaf.addressable_shards[shard].data)
      np.copyto(pieces.view(data, piece, leaf.dtype), leaf[slices])
    chunks = [
      data[start : max(start, min(start + group.chunk_bytes, used))]
      for start in range(0, data.size, group.chunk_bytes)
    ]
    header = {
      'num_bytes': used,
      'checksums': [checksums.of_chunk(chunk) for chunk in chunks],
      'process': jax.process_index(),
      'num_processes': jax.process_count(),
      'leaves': layout.leaves,
      'pieces': [(p.leaf, p.rectangle, p.offset) for p in layout.pieces[index]],
      **about,
    }
    return feed.end(header, data)

  def _planned(self, leaves):
    """The layout, and where each piece is read; the same step after step."""
    key = [
      (k, x.shape, jnp.dtype(x.dtype), getattr(x, 'sharding', None))
      for k, x in leaves.items()
    ]
    if self._plan is None or self._plan[0] != key:
      layout = pieces.make_layout(leaves, self._owner_of)
      sources = {
        i: [_source(piece, leaves[piece.leaf]) for piece in layout.pieces[i]]
        for i in self._feeds
      }
      self._plan = key, layout, sources
    return self._plan[1:]


def _source(piece, leaf):
  """The piece, the shard of this process it is in, and where in that."""
  if not isinstance(leaf, jax.Array):
    return (
      piece,
      None,
      pieces.within(piece.rectangle, tuple((0, n) for n in leaf.shape)),
    )
  size = math.prod(b - a for a, b in piece.rectangle)
  for number, shard in enumerate(leaf.addressable_shards):
    whole = pieces.to_rectangle(shard.index, leaf.shape)
    both = pieces.intersect(piece.rectangle, whole)
    if both == piece.rectangle or not size:
      return piece, number, pieces.within(piece.rectangle, whole)
  raise AssertionError(f'{piece} is in no shard of this process')
