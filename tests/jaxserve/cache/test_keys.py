"""Keys name pages by their tokens, however these come."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxserve.cache import keys as keys_lib
from jaxserve.cache.keys import Keys

_tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(st.lists(_tokens, max_size=5), st.integers(1, 5))
def test_pieces_give_the_keys_of_the_whole(pieces, page_size):
  keys = Keys((), page_size)
  whole = []
  for piece in pieces:
    whole += piece
    keys.extend(piece)
    keys.update(whole)  # Nothing is new.
  assert len(keys) == len(whole)
  count = len(whole) // page_size
  for i in range(count + 1):
    page = whole[i * page_size : (i + 1) * page_size]
    for n in range(page_size + 1):
      part = np.frombuffer(keys.part(i, n), np.int32)
      assert part.tolist() == page[:n]
  assert len(keys.pages) == count
  once = Keys(np.array(whole, np.int64), page_size)
  assert (once.pages, once.rest) == (keys.pages, keys.rest)


@given(_tokens, _tokens, _tokens)
def test_common_tokens_are_counted_from_the_start(start, a, b):
  key = lambda tokens: Keys(tokens, 100).rest
  a, b = start + a, start + b
  equal = [x == y for x, y in zip(a, b, strict=False)]
  expected = (equal + [False]).index(False)
  assert keys_lib.num_common(key(a), key(b)) == expected


def test_a_copy_goes_its_own_way():
  keys = Keys(range(5), 2)
  other = keys.copy()
  other.extend([9, 9, 9])
  assert (len(keys), len(other)) == (5, 8)
  assert keys.pages == Keys(range(4), 2).pages
  assert other.pages == Keys([0, 1, 2, 3, 4, 9, 9, 9], 2).pages


def test_refuses_pages_of_another_size():
  keys = Keys([1, 2], 2)
  assert keys_lib.page_keys(keys, 2) is keys
  with pytest.raises(ValueError, match='pages of 2 tokens do not fit'):
    keys_lib.page_keys(keys, 3)
  with pytest.raises(ValueError, match='page_size=0'):
    Keys([], 0)
