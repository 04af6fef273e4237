"""Host side of the paged KV cache: which pages are free."""


class PageAllocator:
  """A free list of page numbers 0 .. num_pages - 1; lowest number first."""

  def __init__(self, num_pages: int):
    if num_pages < 1:
      raise ValueError(f'num_pages={num_pages} must be at least 1')
    self.num_pages = num_pages
    self._free = list(range(num_pages - 1, -1, -1))
    self._is_used = [False] * num_pages

  @property
  def num_free(self) -> int:
    return len(self._free)

  @property
  def num_used(self) -> int:
    return self.num_pages - len(self._free)

  def take(self, count: int) -> list[int]:
    """Takes `count` pages.

    Raises:
      ValueError: Fewer are free. Nothing is taken.
    """
    if count > len(self._free):
      raise ValueError(
        f'asked for {count} pages, but {len(self._free)} of {self.num_pages} '
        'are free'
      )
    pages = [self._free.pop() for _ in range(count)]
    for p in pages:
      self._is_used[p] = True
    return pages

  def give_back(self, pages: list[int]) -> None:
    """Returns pages to the free list.

    Raises:
      ValueError: A page is not in use. Nothing is returned.
    """
    if len(set(pages)) != len(pages) or not all(
      0 <= p < self.num_pages and self._is_used[p] for p in pages
    ):
      raise ValueError(f'pages {pages} are not all in use, once each')
    for p in reversed(pages):
      self._is_used[p] = False
      self._free.append(p)
