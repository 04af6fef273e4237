"""Which tiles of keys the backward of flash_attention visits, for TPUs.

A tile is a block of queries against a chunk of keys. Its least and greatest
positions and segments tell whether every query of it sees every key (no mask),
none does (no visit), or a mask decides. The tables are read by the scalar core.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Position of keys that only fill up the last chunk.
NEVER = 2**30


class Visits(NamedTuple):
  """Tables, flattened; E is 1 if all rows of the batch are alike, else B.

  Attributes:
    order: Chunks of each run, those without a mask first, then the masked ones,
      then those not visited, [E, runs, blocks, run_chunks].
    counts: How many of the first and of the first two kinds,
      [E, runs, blocks, 2].
    fetch: Which block is in VMEM at a step: itself where it visits the run,
      else the next that does; [E, runs, blocks].
  """

  order: jax.Array
  counts: jax.Array
  fetch: jax.Array


def visits(
  positions: tuple[jax.Array, jax.Array],
  segments: tuple[jax.Array, jax.Array] | None,
  window: jax.Array,
  *,
  block_q: int,
  chunk: int,
  run_chunks: int,
  has_diagonal: bool,
) -> Visits:
  """Finds the tiles with work.

  Args:
    positions: Of queries and keys, [1 or B, length].
    segments: The same of their segments, or `None`.
    window: Keys that a query sees, an int32 scalar.
    block_q: Queries of a tile, a divisor of the length.
    chunk: Keys of a tile, another.
    run_chunks: Chunks of a run, that are in VMEM at once.
    has_diagonal: Whether tiles on the diagonal are visited apart and are not to
      be listed.
  """
  q_low, q_high = _extremes(positions[0], block_q)
  kv_low, kv_high = _extremes(positions[1], chunk)
  nearest = q_low[:, :, None] - kv_high[:, None]
  farthest = q_high[:, :, None] - kv_low[:, None]
  visible = (farthest >= 0) & (nearest < window)
  whole = (nearest >= 0) & (farthest < window)
  if segments is not None:
    q_low, q_high = (x[:, :, None] for x in _extremes(segments[0], block_q))
    kv_low, kv_high = (x[:, None] for x in _extremes(segments[1], chunk))
    visible &= (q_low <= kv_high) & (kv_low <= q_high)
    whole &= (q_low == kv_high) & (kv_low == q_high)
  blocks, chunks = visible.shape[1:]
  # Of all chunks of a row, [.., blocks, chunks] to [.., runs, blocks, chunks].
  by_run = lambda x: x.reshape(-1, blocks, chunks // run_chunks, run_chunks)
  by_run = lambda x, by_run=by_run: by_run(x).swapaxes(1, 2)
  works = by_run(visible).any(-1)
  if has_diagonal:
    first_query = jnp.arange(blocks)[:, None] * block_q
    key = jnp.arange(chunks) * chunk
    diagonal = (key >= first_query) & (key < first_query + block_q)
    works |= by_run(diagonal[None]).any(-1)
    visible, whole = visible & ~diagonal, whole & ~diagonal
  kind = by_run(jnp.where(whole, 0, jnp.where(visible, 1, 2)))
  order = jnp.argsort(kind, axis=-1, stable=True)
  counts = jnp.stack([(kind < n).sum(-1) for n in (1, 2)], axis=-1)
  if chunks == run_chunks:
    # Every block of gradients is to be written, if only with zeros.
    works = jnp.ones_like(works)
  else:
    # What a run adds to is read from HBM while the block before is at work, and
    # written during the two blocks after: four blocks from run to run.
    end = jnp.arange(blocks)
    works |= (end < 2) | (end >= blocks - 2)
  flat = (x.astype(jnp.int32).reshape(-1) for x in (order, counts))
  return Visits(*flat, _fetch(works).astype(jnp.int32).reshape(-1))


def _extremes(x, size):
  x = x.reshape(x.shape[0], -1, size)
  return x.min(-1), x.max(-1)


def _fetch(works):
  """[.., blocks]: the next block that works; the last one does."""
  index = jnp.arange(works.shape[-1])
  return jax.lax.cummin(
    jnp.where(works, index, index[-1]), axis=works.ndim - 1, reverse=True
  )
