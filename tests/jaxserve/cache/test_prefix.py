"""The prefix cache on sequences small enough to follow.

Random ones are in `test_prefix_machine.py`.
"""

import dataclasses

import numpy as np
import pytest

from jaxserve.cache import scores
from jaxserve.cache.allocator import PageAllocator
from jaxserve.cache.keys import Keys
from jaxserve.cache.match import Match
from jaxserve.cache.offload import HostTier
from jaxserve.cache.prefix import PrefixCache

_Z = 4


@dataclasses.dataclass
class _Copied:
  arrays: np.ndarray
  is_ready: bool = True

  def wait(self):
    return self.arrays


def _cache(num_pages=32, **kwargs):
  allocator = PageAllocator(num_pages)
  return allocator, PrefixCache(allocator, _Z, **kwargs)


def _run(allocator, cache, tokens):
  """A request from admission to its end."""
  match = cache.match(tokens, len(tokens) - 1)
  if match.copy_from is not None:
    cache.done_copying(match.copy_from)
  new = allocator.take(-(-len(tokens) // _Z) - len(match.pages))
  cache.insert(tokens, match.pages + new)
  allocator.give_back(match.pages + new)
  return match


def test_evicts_in_the_order_of_the_score():
  orders = {}
  for score in (scores.lru, scores.lfu, scores.cost):
    allocator, cache = _cache(score=score)
    once, often, long = [1] * 3, [2] * 3, [3] * 12
    for tokens in (once, often, often, often, long, once):
      _run(allocator, cache, tokens)
    order = []
    while cache.num_cached_pages:
      had = {x[0]: cache.peek(x) for x in (once, often, long)}
      cache.evict(1)
      order += [x[0] for x in (once, often, long) if cache.peek(x) < had[x[0]]]
    orders[score.__name__] = order
  assert orders == {
    'lru': [2, 3, 3, 3, 1],
    # The three pages of the long prompt were used once, the others more often.
    'lfu': [3, 3, 3, 1, 2],
    'cost': [3, 3, 3, 1, 2],
  }


def test_knows_what_others_hold():
  allocator, cache = _cache()
  tokens = [*range(10)]
  _run(allocator, cache, tokens)
  assert cache.peek(tokens, 9) == 9
  assert cache.peek_held(tokens, 9) == 0
  held = cache.match(tokens[:5], 4)
  assert cache.peek_held(tokens, 9) == 4
  assert cache.num_evictable == 2
  cache.release(held)
  assert cache.peek_held(tokens, 9) == 0


def test_statistics_count_tokens():
  allocator, cache = _cache()
  _run(allocator, cache, list(range(10)))
  match = _run(allocator, cache, [*range(6), 99, 98])
  assert match.num_tokens == 4 and match.num_partial == 2
  cache.release(cache.match(list(range(10))))
  stats = cache.stats
  assert (stats.num_lookups, stats.num_looked_up, stats.num_hit) == (2, 16, 6)
  assert stats.hit_rate == 6 / 16
  pages = allocator.take(1)
  cache.release(Match(pages, 4))  # Of a sibling: the cache was not asked.
  assert (stats.num_lookups, stats.num_hit) == (2, 6)
  assert cache.evict(100) == stats.num_evicted == 4
  assert allocator.num_used == 0


def test_small_overlaps_are_not_worth_a_copy():
  allocator, cache = _cache(min_partial=3)
  _run(allocator, cache, [1, 2, 3, 4])
  assert cache.peek([1, 2, 9, 9]) == 0
  assert cache.peek([1, 2, 3, 9]) == 3


def test_pages_are_loaded_from_the_host():
  content = np.arange(32)
  tier = HostTier(3, 1, lambda pages: _Copied(content[pages]))
  allocator, cache = _cache(host_tier=tier)
  tokens = list(range(10))
  pages = allocator.take(3)
  cache.insert(tokens, pages)
  allocator.give_back(pages)
  assert cache.evict(3) == 3 and allocator.num_used == 0
  match = cache.match(tokens)
  assert match.pages == [-1, -1] and match.copy_from is None
  assert match.num_partial == 2 and match.num_cached == 10
  assert [(int(p.wait()), i) for p, i in match.load] == [
    (p, i) for i, p in enumerate(pages)
  ]
  assert cache.stats.num_hit_on_host == 10
  fresh = allocator.take(3)
  assert cache.insert(tokens, fresh) == 3  # On the device again.
  assert cache.match(tokens).pages == fresh[:2]
  assert tier.num_copied == 3
  allocator.give_back(fresh)
  allocator.give_back(fresh[:2])
  allocator.give_back(fresh[2:])
  assert cache.evict(3) == 3 and tier.num_copied == 3  # Still has its copies.


def test_a_page_that_is_replaced_while_it_is_copied_lives_until_then():
  allocator, cache = _cache()
  _run(allocator, cache, [1, 1, 1, 1, 2, 2])
  match = cache.match([1, 1, 1, 1, 2, 2, 9])
  allocator.give_back(match.pages)
  assert match.num_partial == 2 and cache.num_evictable == 0
  _run(allocator, cache, [1, 1, 1, 1, 2, 2, 3, 3])
  # The fuller page is kept in its place; nobody pins the first one any more.
  assert cache.num_cached_pages == cache.num_evictable == 2
  assert allocator.num_used == 3
  cache.done_copying(match.copy_from)
  assert allocator.num_used == 2


def test_a_full_tier_drops_what_lies_behind_with_what_it_drops():
  tier = HostTier(3, 1, lambda pages: _Copied(np.array(pages)))
  allocator, cache = _cache(host_tier=tier)
  a, b = [1] * 12, [2] * 12
  _run(allocator, cache, a)
  cache.evict(3)
  assert cache.peek(a) == 12
  # The first page of `a` becomes its least recently used copy.
  for page in list(tier._owners)[:2]:
    tier.touch([page])
  _run(allocator, cache, b)
  cache.evict(1)
  assert cache.peek(a) == 0 and cache.peek(b) == 12
  assert len(tier) == 1 and tier.num_dropped == 1


def test_copies_of_evicted_pages_are_not_dropped_for_others():
  tier = HostTier(3, 1, lambda pages: _Copied(np.array(pages)))
  allocator, cache = _cache(host_tier=tier)
  a, b = [1] * 4, [2] * 8
  _run(allocator, cache, a)
  cache.evict(1)
  pages = allocator.take(1)
  cache.insert(a, pages)
  _run(allocator, cache, [3] * 8)
  cache.evict(2)  # Newer copies than that of `a`.
  _run(allocator, cache, b)
  allocator.give_back(pages)
  assert cache.evict(3) == 3
  assert cache.peek(a) == 4 and cache.peek(b) == 8 and len(tier) == 3
  assert tier.num_copied == 5


def test_a_copy_that_fails_costs_the_cached_pages_only():
  def fail(pages):
    raise RuntimeError('no such device')

  allocator, cache = _cache(host_tier=HostTier(8, 1, fail))
  _run(allocator, cache, [1] * 12)
  with pytest.raises(RuntimeError, match='no such device'):
    cache.evict(2)
  allocator.check()
  assert allocator.num_used == cache.num_cached_pages == 1
  assert cache.num_evictable == 1 and cache.peek([1] * 12) == 4
  _run(allocator, cache, [1] * 12)
  assert cache.peek([1] * 12) == 12


def test_a_parent_waits_for_its_children_whatever_their_scores():
  allocator, cache = _cache(score=scores.lfu)
  a = allocator.take(1)
  cache.insert([1] * 4, a)
  allocator.give_back(a)  # In the queue, as a leaf.
  b = allocator.take(2)
  assert cache.insert([1] * 8, b) == 1  # Its own copy of the first page.
  allocator.give_back(b)
  assert cache.num_evictable == 2
  assert cache.evict(1) == 1 and cache.peek([1] * 8) == 4
  assert cache.evict(1) == 1 and allocator.num_used == 0


def test_what_is_used_without_being_held_is_used():
  allocator, cache = _cache()
  a, b = [1] * 4, [2] * 4
  again = allocator.take(1)
  _run(allocator, cache, a)
  _run(allocator, cache, b)
  assert cache.insert(a, again) == 0  # Computed by two requests at once.
  allocator.give_back(again)
  cache.evict(1)
  assert cache.peek(a) == 4 and cache.peek(b) == 0


def test_refuses_misuse():
  allocator, cache = _cache()
  pages = allocator.take(2)
  with pytest.raises(ValueError, match='num_tokens=9'):
    cache.insert(list(range(9)), pages)
  with pytest.raises(ValueError, match='not all in use'):
    cache.insert([1] * 4, [7])
  cache.insert([1] * 8, pages)
  with pytest.raises(ValueError, match='in the prefix cache already'):
    cache.insert([2] * 8, pages)
  with pytest.raises(ValueError, match='pages of 5 tokens'):
    cache.match(Keys([1] * 8, 5))
  with pytest.raises(ValueError, match='has a prefix cache'):
    PrefixCache(allocator, _Z)
  assert cache.num_cached_pages == 2 and cache.num_evictable == 0
