"""Pages are counted right, whatever happens to them."""

import random

import pytest

from jaxserve.simulate.pool import PagePool


def test_equal_prefixes_have_equal_numbers():
  pool = PagePool(9, 2, True)
  a, b = pool.prefixes((1, 2, 3, 4, 5)), pool.prefixes((1, 2, 9, 4))
  assert len(a) == len(b) == 2
  assert a[0] == b[0] and a[1] != b[1]
  assert pool.prefixes((1, 2, 3, 4)) == a
  # The same page of tokens after another prefix is another page.
  assert pool.prefixes((3, 4))[0] not in a
  assert PagePool(9, 2, False).prefixes((1, 2, 3)) == []


def test_what_was_published_is_found_until_its_room_is_needed():
  pool = PagePool(4, 2, True)
  prefixes = pool.prefixes(range(6))
  pages = [
    pool.publish(page, prefix)
    for page, prefix in zip(pool.take(3), prefixes, strict=True)
  ]
  assert (pool.num_free, pool.num_cached(prefixes)) == (1, 3)
  assert pool.num_shared(prefixes) == 3
  pool.release(pages)
  assert (pool.num_free, pool.num_cached(prefixes)) == (4, 3)
  assert pool.num_shared(prefixes) == 0
  held = pool.hold(prefixes[:1])
  assert pool.num_free == 3
  pool.take(2)
  assert pool.num_cached(prefixes) == 2, 'the end goes first'
  pool.take(1)
  assert pool.num_cached(prefixes) == 1
  with pytest.raises(ValueError, match='1 pages wanted, 0 free'):
    pool.take(1)
  pool.release(held)
  assert pool.num_free == 1


def test_never_more_pages_than_there_are():
  rng = random.Random(0)
  pool = PagePool(20, 1, True)
  holders = []
  for _ in range(2000):
    if holders and rng.random() < 0.5:
      pool.release(holders.pop(rng.randrange(len(holders))))
    else:
      prefixes = pool.prefixes([rng.randrange(2) for _ in range(6)])
      pages = pool.hold(prefixes[: pool.num_cached(prefixes)])
      if 6 - len(pages) > pool.num_free:
        pool.release(pages)
      else:
        first = len(pages)
        pages += pool.take(6 - first)
        for i in range(first, rng.randint(first, 6)):
          pages[i] = pool.publish(pages[i], prefixes[i])
        holders.append(pages)
    # Equal prefixes are one page; private ones are one each.
    distinct = {p for pages in holders for p in pages if p is not None}
    private = sum(p is None for pages in holders for p in pages)
    assert pool.num_free == 20 - len(distinct) - private
    assert 0 <= pool.num_free
