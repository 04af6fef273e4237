"""Parity over k chunks of bytes: m rows of it, and any m lost chunks come back.

"An XOR-Based Erasure-Resilient Coding Scheme", Bloemer, Kalfane, Karp,
Karpinski, Luby and Zuckerman, ICSI TR-95-048, 1995,
http://www.icsi.berkeley.edu/icsi/publication_details?n=988: the systematic
Reed-Solomon code of a Cauchy matrix, row r of parity being the sum over j of
c[r][j] times chunk j in GF(2^8). Written from memory; only the abstract was at
hand. Deviations: columns are scaled so that row 0 is all ones (one row of
parity is plain XOR), which leaves every square submatrix regular; and products
are looked up for two bytes at once instead of being made of XORs of bits.
"""

from collections.abc import Mapping, Sequence
import functools

import numpy as np

_POLYNOMIAL = 0x11D  # x^8 + x^4 + x^3 + x^2 + 1, of which 2 is a generator.
_BLOCK_BYTES = 1 << 18  # In the cache of a core, with its product.
MAX_CHUNKS = 256


@functools.cache
def _logs():
  """Powers of 2, twice over so that sums of logarithms need no modulus."""
  exp, log = np.zeros(510, np.uint8), np.zeros(256, np.int64)
  value = 1
  for i in range(255):
    exp[i] = exp[i + 255] = value
    log[value] = i
    value <<= 1
    if value & 0x100:
      value ^= _POLYNOMIAL
  return exp, log


def _multiply(a: int, b: int) -> int:
  exp, log = _logs()
  return int(exp[log[a] + log[b]]) if a and b else 0


def _inverse(a: int) -> int:
  exp, log = _logs()
  return int(exp[255 - log[a]])


@functools.lru_cache(maxsize=64)
def _products(coefficient):
  """`coefficient` times each of two bytes, for every two bytes."""
  one = np.array(
    [_multiply(coefficient, x) for x in range(256)], dtype=np.uint16
  )
  return ((one << 8)[:, None] | one).ravel()


@functools.lru_cache(maxsize=64)
def coefficients(num_data: int, num_parity: int) -> np.ndarray:
  """The matrix c of the code, uint8 `[num_parity, num_data]`; row 0 is ones.

  Raises:
    ValueError: No data, or more than 256 chunks in all.
  """
  if num_data < 1 or num_parity < 0 or num_data + num_parity > MAX_CHUNKS:
    raise ValueError(
      f'num_data={num_data} and num_parity={num_parity}: there must be data, '
      f'and at most {MAX_CHUNKS} chunks in all'
    )
  c = np.zeros((num_parity, num_data), np.uint8)
  for j in range(num_data):
    # 1 / (x_r + y_j) with x_r = r and y_j = m + j, over its own row 0.
    scale = num_parity + j
    for r in range(num_parity):
      c[r, j] = _multiply(scale, _inverse(r ^ (num_parity + j)))
  c.flags.writeable = False
  return c


def accumulate(
  into: np.ndarray, chunk: np.ndarray, coefficient: int = 1
) -> None:
  """Adds `coefficient` times `chunk` to `into`, both uint8 `[bytes]`.

  Args:
    into: Changed in place.
    chunk: As long, or shorter: as if zeros followed.
    coefficient: 0..255; 1 is XOR.
  """
  for start in range(0, chunk.size, _BLOCK_BYTES):
    part = chunk[start : start + _BLOCK_BYTES]
    out = into[start : start + part.size]
    np.bitwise_xor(out, _times(coefficient, part), out=out)


def _times(coefficient, chunk):
  if coefficient == 1:
    return chunk
  even = chunk.size & ~1
  table = _products(coefficient)
  product = np.empty_like(chunk)
  product[:even] = table.take(chunk[:even].view(np.uint16)).view(np.uint8)
  if even < chunk.size:
    product[even] = table[int(chunk[even])] & 0xFF
  return product


def encode(chunks: Sequence[np.ndarray], num_parity: int) -> list[np.ndarray]:
  """Parity of `chunks`.

  Args:
    chunks: k arrays uint8 `[bytes]`, all as long.
    num_parity: m.

  Returns:
    m arrays uint8 `[bytes]`.

  Raises:
    ValueError: See `coefficients`.
  """
  matrix = coefficients(len(chunks), num_parity)
  rows = [np.zeros_like(chunks[0]) for _ in range(num_parity)]
  for row, factors in zip(rows, matrix, strict=True):
    for chunk, factor in zip(chunks, factors, strict=True):
      accumulate(row, chunk, int(factor))
  return rows


def decode(
  known: Mapping[int, np.ndarray], num_data: int, num_parity: int
) -> dict[int, np.ndarray]:
  """The chunks that are lost.

  Args:
    known: What there is, uint8 `[bytes]`, all as long: chunk j as j, row r of
      parity as `num_data + r`.
    num_data: k.
    num_parity: m.

  Returns:
    `{j: chunk}` for every j below k that is not in `known`.

  Raises:
    ValueError: Fewer than k of the k + m are known.
  """
  lost = [j for j in range(num_data) if j not in known]
  rows = [r for r in range(num_parity) if num_data + r in known][: len(lost)]
  if len(rows) < len(lost):
    raise ValueError(
      f'chunks {lost} are lost and only {len(rows)} rows of parity are known'
    )
  matrix = coefficients(num_data, num_parity)
  sums = []
  for r in rows:
    rest = known[num_data + r].copy()
    for j in range(num_data):
      if j in known:
        accumulate(rest, known[j], int(matrix[r, j]))
    sums.append(rest)
  solved = {}
  for j, factors in zip(
    lost, _inverted(matrix[np.ix_(rows, lost)]), strict=True
  ):
    solved[j] = np.zeros_like(sums[0])
    for rest, factor in zip(sums, factors, strict=True):
      accumulate(solved[j], rest, factor)
  return solved


def _inverted(matrix):
  """Gauss-Jordan in GF(2^8), on lists: the matrices are tiny."""
  n = len(matrix)
  left = [
    [int(x) for x in row] + [int(i == j) for j in range(n)]
    for i, row in enumerate(matrix)
  ]
  for i in range(n):
    pivot = next(r for r in range(i, n) if left[r][i])
    left[i], left[pivot] = left[pivot], left[i]
    scale = _inverse(left[i][i])
    left[i] = [_multiply(scale, x) for x in left[i]]
    for r in range(n):
      if r != i and (factor := left[r][i]):
        left[r] = [
          x ^ _multiply(factor, y)
          for x, y in zip(left[r], left[i], strict=True)
        ]
  return [row[n:] for row in left]
