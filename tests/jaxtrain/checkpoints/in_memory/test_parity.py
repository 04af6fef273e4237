"""Any m chunks may be lost; arithmetic is that of the field, bit by bit."""

import itertools

import numpy as np
import pytest

from jaxtrain.checkpoints.in_memory import parity


def _slow_product(a, b):
  """Product of two polynomials over GF(2), modulo x^8+x^4+x^3+x^2+1."""
  result = 0
  for bit in range(8):
    if b >> bit & 1:
      result ^= a << bit
  for bit in range(14, 7, -1):
    if result >> bit & 1:
      result ^= 0x11D << (bit - 8)
  return result


def _chunks(num_data, num_bytes=37, seed=0):
  rng = np.random.default_rng(seed)
  return list(rng.integers(0, 256, (num_data, num_bytes), dtype=np.uint8))


def test_products_are_those_of_the_field():
  every = np.arange(256, dtype=np.uint8)
  for c in range(256):
    out = np.zeros(256, np.uint8)
    parity.accumulate(out, every, c)
    assert out.tolist() == [_slow_product(c, x) for x in range(256)]


@pytest.mark.parametrize('num_parity', [1, 2, 3])
@pytest.mark.parametrize('num_data', [1, 2, 3, 4, 5, 6])
def test_every_pattern_of_losses(num_data, num_parity):
  chunks = _chunks(num_data)
  rows = parity.encode(chunks, num_parity)
  matrix = parity.coefficients(num_data, num_parity)
  for row, factors in zip(rows, matrix, strict=True):
    want = [
      int(
        np.bitwise_xor.reduce(
          [
            _slow_product(int(f), int(x))
            for f, x in zip(factors, column, strict=True)
          ]
        )
      )
      for column in zip(*chunks, strict=True)
    ]
    assert row.tolist() == want
  np.testing.assert_array_equal(rows[0], np.bitwise_xor.reduce(chunks))
  parts = dict(enumerate(chunks + rows))
  for count in range(num_parity + 1):
    for lost in itertools.combinations(parts, count):
      known = {i: x for i, x in parts.items() if i not in lost}
      solved = parity.decode(known, num_data, num_parity)
      assert set(solved) == {i for i in lost if i < num_data}
      for i, x in solved.items():
        np.testing.assert_array_equal(x, chunks[i])


def test_blocks_and_odd_ends():
  a, b = _chunks(2, num_bytes=(1 << 18) + 4097)
  p, q = parity.encode([a, b], 2)
  solved = parity.decode({2: p, 3: q}, 2, 2)
  np.testing.assert_array_equal(solved[0], a)
  np.testing.assert_array_equal(solved[1], b)
  # A shorter chunk is as one with zeros behind.
  into = p.copy()
  parity.accumulate(into, a[:1001], 7)
  padded = np.concatenate([a[:1001], np.zeros(a.size - 1001, np.uint8)])
  want = p.copy()
  parity.accumulate(want, padded, 7)
  np.testing.assert_array_equal(into, want)


def test_large_groups_keep_every_square_regular():
  # Three of 100 lost, at places drawn at random.
  chunks = _chunks(97, num_bytes=8)
  parts = dict(enumerate(chunks + parity.encode(chunks, 3)))
  rng = np.random.default_rng(1)
  for _ in range(20):
    lost = rng.choice(100, 3, replace=False)
    known = {i: x for i, x in parts.items() if i not in lost}
    for i, x in parity.decode(known, 97, 3).items():
      np.testing.assert_array_equal(x, chunks[i])


def test_errors():
  chunks = _chunks(3)
  with pytest.raises(ValueError, match=r'chunks \[0, 1\] are lost and only 1'):
    parity.decode({2: chunks[2], 3: chunks[0]}, 3, 2)
  with pytest.raises(ValueError, match='num_data=200 and num_parity=57'):
    parity.coefficients(200, 57)
