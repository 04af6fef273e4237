"""The prefix cache against a dictionary of all prefixes.

A small engine is played whose pages hold, in place of keys and values, what
these depend on: all tokens up to theirs. Whatever the cache hands out can then
be compared with what the request would have computed.
"""

import collections
import dataclasses
import random

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
_WEIGHTS = {
  'admit': 6,
  'grow': 3,
  'publish': 3,
  'finish': 4,
  'preempt_and_resume': 1,
  'evict': 1,
  'evict_while_another_is_admitted': 2,
  'clear': 0.1,
}
_ALONE = {'admit', 'evict', 'evict_while_another_is_admitted', 'clear'}
# What requests start with: they share more or less of it.
_FAMILIAR = ([], [0] * 30, [0] * 9 + [1] * 21, [0] * 14 + [2] * 16)


@dataclasses.dataclass
class _Request:
  tokens: list[int]
  keys: Keys
  pages: list[int]


@dataclasses.dataclass
class _Copied:
  arrays: np.ndarray
  is_ready: bool = True

  def wait(self):
    return self.arrays


def _ceil(count):
  return -(-count // _Z)


class _Engine:
  """Requests come, grow and go; nothing gets lost or mixed up."""

  def __init__(self, rng, host_pages, score):
    self.rng = rng
    self.running: list[_Request] = []
    self.borrowed: set[int] = set()
    self.past = [list(x) for x in _FAMILIAR]
    self.known: dict[tuple[int, ...], int] = {}
    self.content = np.full((_NUM_PAGES, _Z), _GARBAGE)
    self.allocator = PageAllocator(_NUM_PAGES)
    self.tier = None
    if host_pages:
      read = lambda pages: _Copied(self.content[pages], self.rng.random() < 0.5)
      self.tier = HostTier(host_pages * 10 + 3, 10, read)
    self.cache = PrefixCache(
      self.allocator, _Z, score=score, host_tier=self.tier
    )
    self.counts = collections.Counter()

  def step(self):
    names, weights = zip(*_WEIGHTS.items(), strict=True)
    (name,) = self.rng.choices(names, weights)
    if self.running or name in _ALONE:
      getattr(self, name)()
      self.counts[name] += 1

  # What the engine does.

  def admit(self):
    tokens = self._some_tokens() + self._more(4) or [0]
    spare = self.rng.randint(0, 1)
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
    self.counts['whole'] += match.num_tokens > 0
    self.counts['copied'] += match.copy_from is not None
    self.counts['loaded'] += len(match.load)

  def grow(self):
    r = self.rng.choice(self.running)
    for token in self._more(6):
      if len(r.tokens) % _Z == 0:
        if not self._reserve(1):
          return
        r.pages += self.allocator.take(1)
      r.tokens.append(token)
      self._compute(r, len(r.tokens) - 1)

  def publish(self):
    final = self.rng.random() < 0.3
    self._insert(self.rng.choice(self.running), final)

  def finish(self):
    r = self._leave()
    if self.rng.random() < 0.8:
      self._insert(r, True)
    if self.rng.random() < 0.5 and len(r.tokens) % _Z:
      # A step that was dispatched already writes the token after the last.
      self.content[r.pages[-1], len(r.tokens) % _Z] = _GARBAGE
    self.allocator.give_back(r.pages)
    self.past = [*self.past, r.tokens][-20:]

  def preempt_and_resume(self):
    r = self._leave()
    self._insert(r, True)
    self.allocator.give_back(r.pages)
    r.pages = []
    self._enter(r)

  def evict(self):
    self._evict(self.rng.randint(0, 5))

  def evict_while_another_is_admitted(self):
    before = set(self.known)
    match = self.cache.match(self._some_tokens())
    shared = {p for p in match.pages if p >= 0} | {match.copy_from} - {None}
    self.borrowed = shared
    self._evict(self.rng.randint(1, 4))
    assert shared <= set(self.known.values()) and set(self.known) <= before
    self.borrowed = set()
    self.cache.release(match)

  def clear(self):
    self.cache.clear()
    self.known = {}
    for r in self.running:
      if r.keys.bookmark is not None:
        # Computed by what is no longer so.
        assert self.cache.insert(r.keys, r.pages, len(r.keys)) == 0
        r.keys = Keys(r.tokens, _Z)

  def _some_tokens(self):
    return self.rng.choice(self.past)[: self.rng.randint(1, 30)]

  def _more(self, most):
    return self.rng.choices(range(3), k=self.rng.randint(0, most))

  def _leave(self):
    return self.running.pop(self.rng.randrange(len(self.running)))

  # What must hold.

  def holders_are_counted(self):
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

  def content_is_what_the_prefix_says(self):
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

  def requests_keep_their_content(self):
    for r in self.running:
      for i in range(len(r.tokens)):
        assert self._at(r, i) == self._truth(r.tokens, i)

  def end(self):
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
    held = {p for r in self.running for p in r.pages} | self.borrowed
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


@pytest.mark.parametrize('score', [scores.lru, scores.lfu, scores.cost])
@pytest.mark.parametrize('host_pages', [0, 2, 7, 50])
def test_random_requests(host_pages, score):
  counts = collections.Counter()
  for seed in range(3):
    engine = _Engine(random.Random(seed), host_pages, score)
    for _ in range(150):
      engine.step()
      engine.holders_are_counted()
      engine.content_is_what_the_prefix_says()
      engine.requests_keep_their_content()
    engine.end()
    counts += engine.counts
  # The cases that matter did come up.
  assert min(counts[name] for name in _WEIGHTS) >= 1, counts
  assert counts['whole'] > 50 and counts['copied'] > 20, counts
  assert counts['loaded'] >= min(host_pages, 5), counts
