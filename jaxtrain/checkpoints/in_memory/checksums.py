"""Checksums of the blocks of chunks, so that a damaged block counts as lost."""

import zlib

import numpy as np

BLOCK_BYTES = 1 << 20


def block_bounds(length: int) -> list[tuple[int, int]]:
  """Start and stop of every block of a chunk of `length` bytes."""
  return [
    (start, min(start + BLOCK_BYTES, length))
    for start in range(0, length, BLOCK_BYTES)
  ]


def of_chunk(chunk: np.ndarray) -> list[int]:
  """CRC-32 of every block of `chunk`, uint8 `[bytes]`."""
  return [zlib.crc32(chunk[a:b]) for a, b in block_bounds(chunk.size)]
