"""The scalar core's arithmetic against numpy's fixed-width types."""

import operator

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from pallas_kernels.tpu_compiler import values

_F = values.FUNCTIONS
_WORDS = st.integers(0, 2**32 - 1)
_EDGES = st.sampled_from([0, 1, 31, 32, 2**31 - 1, 2**31, 2**32 - 1])
_ANY = st.one_of(_EDGES, _WORDS)


def _int32(word):
  return np.uint32(word).view(np.int32)


@given(_ANY, _ANY)
def test_minimum_and_maximum(a, b):
  assert _F['unsigned_min'](a, b) == min(a, b)
  assert _F['unsigned_max'](a, b) == max(a, b)
  assert _int32(_F['signed_min'](a, b)) == min(_int32(a), _int32(b))
  assert _int32(_F['signed_max'](a, b)) == max(_int32(a), _int32(b))


@given(_ANY, st.integers(0, 31))
def test_shifts(a, count):
  assert _F['shift_left'](a, count) == np.left_shift(
    np.uint32(a), np.uint32(count)
  )
  assert _F['shift_right'](a, count) == np.right_shift(
    np.uint32(a), np.uint32(count)
  )
  assert _int32(_F['shift_right_signed'](a, count)) == np.right_shift(
    _int32(a), np.int32(count)
  )
  ones = np.invert(np.left_shift(np.invert(np.uint32(a)), np.uint32(count)))
  assert _F['shift_left_ones'](a, count) == ones


@given(_ANY)
def test_shifts_beyond_the_word(a):
  assert _F['shift_left'](a, 32) == 0
  assert _F['shift_right'](a, 40) == 0
  assert _int32(_F['shift_right_signed'](a, 40)) == (-1 if a >> 31 else 0)


_FLOATS = st.floats(width=32, allow_nan=False)


@given(_FLOATS, _FLOATS)
def test_floats(a, b):
  word = lambda x: int(np.float32(x).view(np.uint32))
  with np.errstate(all='ignore'):
    for name in ('add', 'sub', 'mul'):
      got = np.uint32(_F[f'float_{name}'](word(a), word(b))).view(np.float32)
      want = getattr(operator, name)(np.float32(a), np.float32(b))
      np.testing.assert_equal(got, want)
  for name in ('eq', 'ne', 'lt', 'le', 'gt', 'ge'):
    got = _F[f'float_{name}'](word(a), word(b))
    assert got == getattr(operator, name)(np.float32(a), np.float32(b))


def test_unknown_is_handed_on_until_a_decision():
  unknown = values.Unknown('the page table')
  for result in (unknown + 1, 3 - unknown, (unknown | 4) & 7, unknown == 2):
    assert isinstance(result, values.Unknown)
  assert isinstance(_F['shift_left'](unknown, 3), values.Unknown)
  assert isinstance(_F['float_lt'](3, unknown), values.Unknown)
  assert unknown & 0 == 0
  for decide in (bool, operator.index, int):
    with pytest.raises(values.UnknownValueError, match='the page table'):
      decide(unknown)
