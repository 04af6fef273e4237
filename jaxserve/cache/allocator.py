"""Host side of the paged KV cache: who holds which page.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", https://arxiv.org/abs/2309.06180, section 4.4: pages are shared
by counting their holders. Deviation: there is no copy on write here; whoever
writes to a page has taken it, and copies of partly filled pages are the prefix
cache's business.
"""

from collections.abc import Sequence
from typing import Protocol


class Watcher(Protocol):
  """Learns when kept pages get or lose their first holder."""

  def on_held(self, pages: list[int]) -> None: ...

  def on_unheld(self, pages: list[int]) -> None: ...


class PageAllocator:
  """Counts the holders of the pages 0 .. num_pages - 1.

  A page is free when nobody holds it. Pages given back last are taken first,
  and fresh ones lowest number first.

  The prefix cache is a holder of its own kind: it *keeps* pages. A kept page
  counts one holder more, and `watcher` learns when the cache becomes, or ceases
  to be, the only one.

  Every method takes time linear in the pages it is given, whatever the pool.

  Attributes:
    num_pages: Pages in the pool.
    watcher: Whom to tell about kept pages.
  """

  def __init__(self, num_pages: int):
    if num_pages < 1:
      raise ValueError(f'num_pages={num_pages} must be at least 1')
    self.num_pages = num_pages
    self.watcher: Watcher | None = None
    self._free = list(range(num_pages - 1, -1, -1))
    self._counts = [0] * num_pages
    self._is_kept = bytearray(num_pages)

  @property
  def num_free(self) -> int:
    return len(self._free)

  @property
  def num_used(self) -> int:
    return self.num_pages - len(self._free)

  def count(self, page: int) -> int:
    """Holders of a page, the prefix cache included."""
    return self._counts[page]

  def take(self, count: int) -> list[int]:
    """Takes `count` free pages; the caller is their only holder.

    Raises:
      ValueError: Fewer are free. Nothing is taken.
    """
    if not 0 <= count <= len(self._free):
      raise ValueError(
        f'asked for {count} pages, but {len(self._free)} of {self.num_pages} '
        'are free'
      )
    first = len(self._free) - count
    pages = self._free[first:][::-1]
    del self._free[first:]
    for p in pages:
      self._counts[p] = 1
    return pages

  def share(self, pages: Sequence[int]) -> None:
    """Counts one more holder of each page.

    Raises:
      ValueError: A page is free, or named twice. Nothing has changed.
    """
    self._check(pages)
    counts, is_kept = self._counts, self._is_kept
    held = []
    for p in pages:
      if counts[p] == 1 and is_kept[p]:
        held.append(p)
      counts[p] += 1
    if held:
      self.watcher.on_held(held)

  def give_back(self, pages: Sequence[int]) -> None:
    """Counts one holder fewer of each page; those without any are free.

    Raises:
      ValueError: A page has no holder who could give it back, or is named
        twice. Nothing has changed.
    """
    self._check(pages, needs_holder=True)
    counts, is_kept = self._counts, self._is_kept
    unheld = []
    for p in reversed(pages):
      counts[p] -= 1
      if not counts[p]:
        self._free.append(p)
      elif counts[p] == 1 and is_kept[p]:
        unheld.append(p)
    if unheld:
      self.watcher.on_unheld(unheld)

  def keep(self, pages: Sequence[int]) -> None:
    """Adds the prefix cache to the holders of pages that others hold.

    Raises:
      ValueError: A page is free, kept already or named twice. Nothing has
        changed.
    """
    self._check(pages)
    counts, is_kept = self._counts, self._is_kept
    if any(map(is_kept.__getitem__, pages)):
      kept = [p for p in pages if is_kept[p]]
      raise ValueError(f'pages {kept[:8]} are in the prefix cache already')
    for p in pages:
      is_kept[p] = 1
      counts[p] += 1

  def drop(self, pages: Sequence[int]) -> None:
    """Takes the prefix cache from the holders of kept pages; tells nobody.

    Raises:
      ValueError: A page is not kept, or named twice. Nothing has changed.
    """
    self._check(pages)
    if lost := [p for p in pages if not self._is_kept[p]]:
      raise ValueError(f'pages {lost[:8]} are not in the prefix cache')
    for p in pages:
      self._is_kept[p] = 0
      self._counts[p] -= 1
      if not self._counts[p]:
        self._free.append(p)

  def check(self) -> None:
    """Asserts what must hold between any two calls."""
    assert sorted(self._free) == [
      p for p, count in enumerate(self._counts) if not count
    ], 'the free list is not the pages without holders'
    assert min(self._counts) >= 0
    assert all(
      count >= 1
      for count, kept in zip(self._counts, self._is_kept, strict=True)
      if kept
    ), 'a kept page is free'

  def _check(self, pages, needs_holder=False):
    counts = self._counts
    ok = not pages or (
      len(set(pages)) == len(pages)
      and min(pages) >= 0
      and max(pages) < self.num_pages
      and all(map(counts.__getitem__, pages))
    )
    if ok and needs_holder:
      ok = all(counts[p] > 1 for p in pages if self._is_kept[p])
    if not ok:
      raise ValueError(
        f'pages {list(pages)} are not all in use, once each, out of '
        f'{self.num_pages}'
      )
