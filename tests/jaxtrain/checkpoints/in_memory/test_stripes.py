"""Every part of a stripe is on a keeper of its own."""

import pytest

from jaxtrain.checkpoints.in_memory.stripes import Stripes


@pytest.mark.parametrize('n,m', [(2, 1), (4, 1), (4, 2), (5, 3), (8, 2)])
def test_stripes_have_each_part_on_a_keeper_of_its_own(n, m):
  stripes = Stripes(n, m)
  for s in range(n):
    assert {stripes.holder(s, part) for part in range(n)} == set(range(n))
    for r in range(m):
      holder = stripes.holder(s, stripes.num_data + r)
      assert holder == (s + r) % n
      assert stripes.rows(holder)[r] == s
  for p in range(n):
    seen = set()
    for j in range(stripes.num_data):
      s = stripes.stripe_of(p, j)
      assert stripes.holder(s, j) == p
      seen.add(s)
      for q in range(n):
        rows = [r for r, x in enumerate(stripes.rows(q)) if x == s]
        sent = [r for c, r in stripes.chunks_for(p, q) if c == j]
        assert sent == rows
    assert len(seen) == stripes.num_data
  assert stripes.chunk_bytes(1000) * stripes.num_data >= 1000
  assert stripes.chunk_bytes(1000) % 64 == 0


@pytest.mark.parametrize('m', [-1, 0, 4, 5])
def test_as_much_parity_as_keepers_is_refused(m):
  with pytest.raises(ValueError, match=f'num_parity={m} must be at least 1'):
    Stripes(4, m)
