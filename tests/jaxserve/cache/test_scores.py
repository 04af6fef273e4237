"""Scores against their formulas, and Greedy-Dual-Size-Frequency as published.

What a score does to the order of eviction is in `test_prefix.py`.
"""

import types

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxserve.cache import scores
from jaxserve.cache.allocator import PageAllocator
from jaxserve.cache.prefix import PrefixCache


def _page(**kwargs):
  fields = dict(last_use=0, num_uses=1, depth=1, floor=0.0)
  return types.SimpleNamespace(**(fields | kwargs))


def test_each_prefers_what_its_name_says():
  assert scores.lru(_page(last_use=3)) > scores.lru(_page(last_use=2))
  assert scores.lfu(_page(num_uses=3)) > scores.lfu(_page(num_uses=2))
  # A page at the depth where attention costs as much as the matrices.
  assert scores.cost(_page(depth=512)) == 2.0
  assert scores.cost(_page(depth=512, num_uses=3, floor=5.0)) == 11.0


@given(
  uses=st.lists(st.integers(0, 6), min_size=1, max_size=60),
  capacity=st.integers(1, 5),
)
@pytest.mark.parametrize('name', ['lru', 'lfu', 'cost'])
def test_single_pages_are_evicted_as_published(name, uses, capacity):
  """Documents of one page: the policies are those of any cache."""
  allocator = PageAllocator(capacity)
  cache = PrefixCache(allocator, 2, score=getattr(scores, name))
  # Document -> frequency, last use, L at that time.
  known, floor = {}, 0.0
  constant = 1 + 1 / 512
  value = {
    'lru': lambda d: known[d][1],
    'lfu': lambda d: known[d][0],
    'cost': lambda d: known[d][2] + known[d][0] * constant,
  }[name]
  for now, document in enumerate(uses):
    tokens = [document, document]
    match = cache.match(tokens)
    assert (match.num_cached == 2) == (document in known)
    pages = match.pages
    if not pages:
      if not allocator.num_free:
        worst = min(known, key=lambda d: (value(d), known[d][1]))
        floor = max(floor, value(worst))
        del known[worst]
        assert cache.evict(1) == 1
      pages = allocator.take(1)
      cache.insert(tokens, pages)
    allocator.give_back(pages)
    known[document] = known.get(document, (0,))[0] + 1, now, floor
