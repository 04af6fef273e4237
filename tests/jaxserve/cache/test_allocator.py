"""The free list never gives a page twice."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxserve.cache.allocator import PageAllocator


@given(st.lists(st.integers(-5, 5), max_size=60))
def test_is_a_partition_of_the_pages(moves):
  allocator, held = PageAllocator(12), []
  for move in moves:
    if move >= 0 and move <= allocator.num_free:
      held.append(allocator.take(move))
    elif held and move < 0:
      allocator.give_back(held.pop(move % len(held)))
    used = [p for pages in held for p in pages]
    assert len(set(used)) == len(used) == allocator.num_used
    assert set(used) <= set(range(12))
    assert allocator.num_free == 12 - len(used)


def test_refuses_misuse_and_changes_nothing():
  allocator = PageAllocator(3)
  pages = allocator.take(2)
  with pytest.raises(ValueError, match='asked for 2 pages, but 1 of 3'):
    allocator.take(2)
  for bad in ([2], [0, 0], [-1], [3], [0, 2]):
    with pytest.raises(ValueError, match='not all in use'):
      allocator.give_back(bad)
  assert allocator.num_used == 2
  allocator.give_back(pages)
  assert sorted(allocator.take(3)) == [0, 1, 2]
  with pytest.raises(ValueError, match='num_pages=0'):
    PageAllocator(0)
