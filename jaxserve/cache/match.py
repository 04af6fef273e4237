"""What a prefix cache answers, and what it was good for."""

import dataclasses

from jaxserve.cache.offload import HostPage


@dataclasses.dataclass
class Match:
  """A cached prefix. What it names is shared with whoever asked.

  Attributes:
    pages: Whole pages from the start; -1 for those that are to be loaded.
    num_tokens: Tokens in them.
    copy_from: A page whose first tokens come next, to be copied to a page of
      the request's own; `done_copying` gives it back.
    num_partial: How many tokens of it, or of a loaded page behind `pages`.
    num_asked: Tokens that could have matched.
    load: Pages on the host, with their indices in the request's pages: fresh
      ones are to be taken and written. The last index is `len(pages)` if the
      page agrees in part only, and then there is no `copy_from`.
  """

  pages: list[int]
  num_tokens: int
  copy_from: int | None = None
  num_partial: int = 0
  num_asked: int = 0
  load: list[tuple[HostPage, int]] = dataclasses.field(default_factory=list)

  @property
  def num_cached(self) -> int:
    """Tokens that need no computation."""
    return self.num_tokens + self.num_partial


@dataclasses.dataclass
class Stats:
  """What the cache was good for.

  Attributes:
    num_lookups: Calls of `match` that could find something, but for those that
      were released.
    num_looked_up: Tokens they asked for.
    num_hit: Tokens they got, from the device or the host.
    num_hit_on_host: Of these, tokens that had to be loaded.
    num_evicted: Pages that left the device.
  """

  num_lookups: int = 0
  num_looked_up: int = 0
  num_hit: int = 0
  num_hit_on_host: int = 0
  num_evicted: int = 0

  @property
  def hit_rate(self) -> float:
    """Share of the tokens that were found."""
    return self.num_hit / max(1, self.num_looked_up)
