"""The prefix cache against a dictionary of all prefixes.

The machine plays an engine whose pages hold, in place of keys and values, what
these depend on: all tokens up to theirs. Whatever the cache hands out can then
be compared with what the request would have computed.
"""

import collections
import dataclasses

from hypothesis import settings
from hypothesis import stateful
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxserve.cache import scores
from jaxserve.cache.allocator import PageAllocator
from jaxserve.cache.keys import Keys
from jaxserve.cache.offload import HostTier
from jaxserve.cache.prefix import PrefixCache

_Z = 4
_NUM_PAGES = 24
_GARBAGE = -7


@dataclasses.dataclass
class _Request:
  tokens: list[int]
  keys: Keys
  pages: list[int]


@dataclasses.dataclass
class _Copied:
  arrays: np.ndarray

  def wait(self):
    return self.arrays


def _ceil(count):
  return -(-count // _Z)


class _Machine(stateful.RuleBasedStateMachine):
  """Requests come, grow and go; nothing gets lost or mixed up."""

  def __init__(self):
    super().__init__()
    self.running: list[_Request] = []
    self.past: list[list[int]] = [[]]
    self.known: dict[tuple[int, ...], int] = {}
    self.content = np.full((_NUM_PAGES, _Z), _GARBAGE)

  @stateful.initialize(
    host_pages=st.sampled_from([0, 2, 7, 50]),
    score=st.sampled_from([scores.lru, scores.lfu, scores.cost]),
  )
  def start(self, host_pages, score):
    self.allocator = PageAllocator(_NUM_PAGES)
    self.tier = None
    if host_pages:
      read = lambda pages: _Copied(self.content[pages])
      self.tier = HostTier(host_pages * 10 + 3, 10, read)
    self.cache = PrefixCache(
      self.allocator, _Z, score=score, host_tier=self.tier
    )

  # What the engine does.

  @stateful.rule(
    which=st.integers(0, 50),
    keep=st.integers(0, 40),
    more=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    spare=st.integers(0, 2),
  )
  def admit(self, which, keep, more, spare):
    tokens = self.past[which % len(self.past)][:keep] + more
    self._enter(_Request(tokens, Keys(tokens, _Z), []), spare)

  def _enter(self, r, spare=1):
    limit = len(r.tokens) - spare
    expected = self._longest(r.tokens, limit)
    before = self.cache.num_evictable
    assert self.cache.peek(r.keys, limit) == expected
    assert self.cache.num_evictable == before
    match = self.cache.match(r.keys, limit)
    assert match.num_cached == expected <= max(0, limit)
    assert match.num_tokens == len(match.pages) * _Z
    assert [i for _, i in match.load] == [
      i for i, p in enumerate(match.pages) if p < 0
    ] + [len(match.pages)] * (match.num_partial > 0 and match.copy_from is None)
    total = _ceil(len(r.tokens))
    need = total - sum(p >= 0 for p in match.pages)
    if not self._reserve(need):
      self.cache.release(match)
      assert self.cache.num_evictable == before
      return
    fresh = iter(self.allocator.take(need))
    r.pages = [next(fresh) if p < 0 else p for p in match.pages]
    r.pages += fresh
    for source, i in match.load:
      self.content[r.pages[i]] = source.wait()
    if match.copy_from is not None:
      own = r.pages[len(match.pages)]
      assert own != match.copy_from
      self.content[own] = self.content[match.copy_from]
      self.cache.done_copying(match.copy_from)
    for i in range(match.num_cached):
      assert self._at(r, i) == self._truth(r.tokens, i)
    for i in range(match.num_cached, len(r.tokens)):
      self._compute(r, i)
    self.running.append(r)

  @stateful.precondition(lambda self: self.running)
  @stateful.rule(which=st.integers(0, 50), more=st.lists(st.integers(0, 2)))
  def grow(self, which, more):
    r = self.running[which % len(self.running)]
    for token in more:
      if len(r.tokens) % _Z == 0:
        if not self._reserve(1):
          return
        r.pages += self.allocator.take(1)
      r.tokens.append(token)
      self._compute(r, len(r.tokens) - 1)

  @stateful.precondition(lambda self: self.running)
  @stateful.rule(which=st.integers(0, 50), final=st.booleans())
  def publish(self, which, final):
    self._insert(self.running[which % len(self.running)], final)

  @stateful.precondition(lambda self: self.running)
  @stateful.rule(
    which=st.integers(0, 50), keep=st.booleans(), late=st.booleans()
  )
  def finish(self, which, keep, late):
    r = self.running.pop(which % len(self.running))
    if keep:
      self._insert(r, True)
    if late and len(r.tokens) % _Z:
      # A step that was dispatched already writes the token after the last.
      self.content[r.pages[-1], len(r.tokens) % _Z] = _GARBAGE
    self.allocator.give_back(r.pages)
    self.past.append(r.tokens)

  @stateful.precondition(lambda self: self.running)
  @stateful.rule(which=st.integers(0, 50))
  def preempt_and_resume(self, which):
    r = self.running.pop(which % len(self.running))
    self._insert(r, True)
    self.allocator.give_back(r.pages)
    r.pages = []
    self._enter(r)

  @stateful.rule(count=st.integers(0, 8))
  def evict(self, count):
    self._evict(count)

  @stateful.rule()
  def clear(self):
    self.cache.clear()
    self.known = {}
    for r in self.running:
      if r.keys.bookmark is not None:
        # Computed by what is no longer so.
        assert self.cache.insert(r.keys, r.pages, len(r.keys)) == 0
        r.keys = Keys(r.tokens, _Z)

  # What must hold.

  @stateful.invariant()
  def holders_are_counted(self):
    if not hasattr(self, 'allocator'):
      return
    self.allocator.check()
    holders = collections.Counter(p for r in self.running for p in r.pages)
    nodes = self._nodes()
    on_device = {k: n.page for k, n in nodes.items() if n.page >= 0}
    holders.update(on_device.values())
    for p in range(_NUM_PAGES):
      assert self.allocator.count(p) == holders[p]
    assert on_device == self.known
    assert self.cache.num_cached_pages == len(self.known)
    assert self.cache.num_evictable == len(self._evictable())

  @stateful.invariant()
  def content_is_what_the_prefix_says(self):
    if not hasattr(self, 'allocator'):
      return
    num_copies = 0
    for tokens, node in self._nodes().items():
      first = (node.depth - 1) * _Z
      truth = [self._truth(tokens, i) for i in range(first, len(tokens))]
      if node.page >= 0:
        assert list(self.content[node.page, : len(truth)]) == truth
      if node.host is not None:
        assert node.host in self.tier
        assert list(node.host.wait()[: len(truth)]) == truth
        num_copies += 1
    if self.tier is not None:
      assert num_copies == len(self.tier) <= self.tier.num_pages

  @stateful.invariant()
  def requests_keep_their_content(self):
    for r in self.running:
      for i in range(len(r.tokens)):
        assert self._at(r, i) == self._truth(r.tokens, i)

  def teardown(self):
    if not hasattr(self, 'allocator'):
      return
    for r in self.running:
      self._insert(r, True)
      self.allocator.give_back(r.pages)
    self.running = []
    assert self.cache.num_evictable == self.cache.num_cached_pages
    assert self.allocator.num_used == len(self.known)
    self.cache.clear()
    assert self.allocator.num_free == _NUM_PAGES
    if self.tier is not None:
      assert not len(self.tier)

  # The brute-force model.

  def _truth(self, tokens, i):
    return hash(tuple(tokens[: i + 1]))

  def _at(self, r, i):
    return self.content[r.pages[i // _Z], i % _Z]

  def _compute(self, r, i):
    page = r.pages[i // _Z]
    if self.allocator.count(page) > 1:
      # Only a partly filled page of its own may be written while it is cached,
      # and only behind the tokens that it is cached for.
      (tokens,) = [k for k, p in self.known.items() if p == page]
      assert len(tokens) <= i and self.allocator.count(page) == 2
    self.content[page, i % _Z] = self._truth(r.tokens, i)

  def _nodes(self):
    """Everything in the tree, by tokens."""
    found, stack = {}, [((), self.cache._tree.root)]
    while stack:
      tokens, node = stack.pop()
      for child in node.values():
        assert child.parent is node and child.depth == node.depth + 1
        assert child.is_alive
        assert node.parent is None or len(node.key) == 4 * _Z
        key = (*tokens, *np.frombuffer(child.key, np.int32).tolist())
        assert key not in found
        found[key] = child
        stack.append((key, child))
    return found

  def _longest(self, tokens, limit):
    best = 0
    cached = set(self._nodes())
    while best + _Z <= limit and tuple(tokens[: best + _Z]) in cached:
      best += _Z
    partial = 0
    for other in cached:
      if len(other) > best and other[:best] == tuple(tokens[:best]):
        count = 0
        for a, b in zip(
          tokens[best : min(limit, best + _Z)], other[best:], strict=False
        ):
          if a != b:
            break
          count += 1
        partial = max(partial, count)
    return best + partial

  def _insert(self, r, final):
    r.keys.update(r.tokens)
    before = set(self.known.values())
    hosted = set(self._nodes()) - set(self.known)
    taken = self.cache.insert(r.keys, r.pages, final=final)
    for i in range(len(r.tokens) // _Z):
      self._learn(tuple(r.tokens[: (i + 1) * _Z]), r.pages[i])
    whole = len(r.tokens) // _Z * _Z
    partial = tuple(r.tokens)
    if final and len(partial) > whole:
      covered = any(
        k[: len(partial)] == partial
        for k in (*self.known, *(hosted - {partial}))
      )
      if not covered:
        self._learn(partial, r.pages[-1])
    assert taken >= len(set(self.known.values()) - before)

  def _learn(self, tokens, page):
    if tokens in self.known:
      return
    first = (len(tokens) - 1) // _Z * _Z
    for k in list(self.known):
      if first < len(k) < len(tokens) and tokens[: len(k)] == k:
        del self.known[k]
    self.known[tokens] = page

  def _evictable(self):
    held = {p for r in self.running for p in r.pages}
    return {
      k
      for k in self.known
      if not any(o[: len(k)] == k and p in held for o, p in self.known.items())
    }

  def _reserve(self, count):
    missing = count - self.allocator.num_free
    if missing > self.cache.num_evictable:
      return False
    if missing > 0:
      self._evict(missing)
    return True

  def _evict(self, count):
    allowed = self._evictable()
    free = self.allocator.num_free
    gone = self.cache.evict(count)
    assert gone == min(count, len(allowed)) == self.allocator.num_free - free
    left = {k for k, n in self._nodes().items() if n.page >= 0}
    lost = set(self.known) - left
    assert len(lost) == gone and lost <= allowed
    # Leaves first: what is left is reachable.
    assert all(k[: (len(k) - 1) // _Z * _Z] in left | {()} for k in left)
    self.known = {k: p for k, p in self.known.items() if k in left}


_Machine.TestCase.settings = settings(
  max_examples=60, stateful_step_count=40, deadline=None
)
test_random_requests = _Machine.TestCase


def _cache(num_pages=32, **kwargs):
  allocator = PageAllocator(num_pages)
  return allocator, PrefixCache(allocator, _Z, **kwargs)


def _run(allocator, cache, tokens):
  """A request from admission to its end."""
  match = cache.match(tokens, len(tokens) - 1)
  if match.copy_from is not None:
    cache.done_copying(match.copy_from)
  new = allocator.take(_ceil(len(tokens)) - len(match.pages))
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


def test_statistics_count_tokens():
  allocator, cache = _cache()
  _run(allocator, cache, list(range(10)))
  match = _run(allocator, cache, [*range(6), 99, 98])
  assert match.num_tokens == 4 and match.num_partial == 2
  cache.release(cache.match(list(range(10))))
  stats = cache.stats
  assert (stats.num_lookups, stats.num_looked_up, stats.num_hit) == (2, 16, 6)
  assert stats.hit_rate == 6 / 16
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
