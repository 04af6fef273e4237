"""Pages of a simulated cache: counted, shared by prefix, evicted by age."""

import collections
from collections.abc import Sequence

# A page that is held: the number of its prefix, or `None` if not shareable.
Page = int | None


class PagePool:
  """Keeps count of pages; full pages of prompts may be found again.

  Args:
    num_pages: Pages there are.
    page_size: Tokens of a page.
    keeps_prefixes: Whether released pages of prompts are kept until their room
      is needed, least recently used first.
  """

  def __init__(self, num_pages: int, page_size: int, keeps_prefixes: bool):
    self.num_pages = num_pages
    self.page_size = page_size
    self._keeps_prefixes = keeps_prefixes
    self._number_of: dict[tuple, int] = {}
    self._num_private = 0
    self._holders: dict[int, int] = {}  # Cached prefix -> requests holding it.
    self._unheld: collections.OrderedDict[int, None] = collections.OrderedDict()

  @property
  def num_free(self) -> int:
    """Pages nobody holds, those of cached prefixes included."""
    return self.num_pages - self._num_private - self._num_held_prefixes

  @property
  def _num_held_prefixes(self):
    return len(self._holders) - len(self._unheld)

  def prefixes(self, prompt: Sequence[int]) -> list[int]:
    """A number for each full page of a prompt, the same for equal prefixes."""
    if not self._keeps_prefixes:
      return []
    numbers, parent = [], -1
    for start in range(0, len(prompt) - self.page_size + 1, self.page_size):
      key = parent, tuple(prompt[start : start + self.page_size])
      parent = self._number_of.setdefault(key, len(self._number_of))
      numbers.append(parent)
    return numbers

  def num_cached(self, prefixes: Sequence[int]) -> int:
    """How many pages, from the first on, are in the cache."""
    return next(
      (i for i, p in enumerate(prefixes) if p not in self._holders),
      len(prefixes),
    )

  def num_shared(self, prefixes: Sequence[int]) -> int:
    """How many of these somebody holds."""
    return next(
      (i for i, p in enumerate(prefixes) if not self._holders.get(p)),
      len(prefixes),
    )

  def hold(self, prefixes: Sequence[int]) -> list[Page]:
    """Holds pages that are cached."""
    for p in prefixes:
      self._holders[p] += 1
      self._unheld.pop(p, None)
    return list(prefixes)

  def take(self, count: int) -> list[Page]:
    """New pages; cached prefixes that nobody holds make room.

    Raises:
      ValueError: There are too few.
    """
    if count > self.num_free:
      raise ValueError(f'{count} pages wanted, {self.num_free} free')
    self._num_private += count
    while self._num_private + len(self._holders) > self.num_pages:
      oldest, _ = self._unheld.popitem(last=False)
      del self._holders[oldest]
    return [None] * count

  def publish(self, page: Page, prefix: int) -> Page:
    """Makes a computed page one that others find."""
    if page is not None or prefix in self._holders:
      return page
    self._num_private -= 1
    self._holders[prefix] = 1
    return prefix

  def release(self, pages: Sequence[Page]) -> None:
    """Gives pages back; the last ones are forgotten first."""
    for p in reversed(pages):
      if p is None:
        self._num_private -= 1
      else:
        self._holders[p] -= 1
        if not self._holders[p]:
          self._unheld[p] = None
