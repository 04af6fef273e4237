"""What a cached page is worth: the one with the lowest score goes first.

A score is a function of a `prefix.Node`. It is asked for when a page could be
evicted for the first time, and again before it is evicted: uses in between may
raise a score, but nothing may lower it. Pages behind a page go before it,
whatever their scores; equal scores are settled by the last use.
"""

from typing import Protocol


class Page(Protocol):
  """What a score may depend on.

  Attributes:
    last_use: When the last holder gave the page back, on a clock that counts
      such events.
    num_uses: Requests that found the page, and the one that computed it.
    depth: Pages from the start of the sequence to this one, itself included.
    floor: Score of the page evicted last, at the time of the last use.
  """

  last_use: int
  num_uses: int
  depth: int
  floor: float


def lru(page: Page) -> float:
  """Least recently used first (Zheng et al., SGLang).

  https://arxiv.org/abs/2312.07104, section 3.
  """
  return page.last_use


def lfu(page: Page) -> float:
  """Least frequently used first; equals by last use."""
  return page.num_uses


def cost(page: Page, pages_of_attention: float = 512.0) -> float:
  """Cheapest to compute again first, aged: Greedy-Dual-Size-Frequency.

  Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency
  Caching Policy", HP Labs report HPL-98-69R1, 1998: `L + frequency * cost /
  size`, where L is the score of what was evicted last. All pages have size 1.
  The cost is that of the page's tokens in a transformer: a constant for the
  matrices, and the tokens before it for attention.

  Args:
    page: The page.
    pages_of_attention: Where attention costs as much as the matrices: at a
      context of about 6 times the model's width.

  Returns:
    The score.
  """
  return page.floor + page.num_uses * (1 + page.depth / pages_of_attention)
