"""What a prefix cache looks a sequence up by: the bytes of its pages.

A page's key is its token ids as bytes. Python hashes bytes once and keeps the
hash, and compares them in C, so that a look-up costs one dictionary access a
page. Unlike the chained hashes of vLLM, keys are compared in full: no two
different prefixes can be taken for one another.
"""

from array import array
from collections.abc import Sequence
from typing import Any

_TOKEN = array('i').itemsize


class Keys:
  """The pages of one sequence, which grows.

  Compute them once per request, and extend them as tokens come: looking up a
  prompt of 100,000 tokens then costs no more than its pages. A cache leaves a
  bookmark in them, so that the next look-up starts where the last one ended.

  Args:
    tokens: Token ids.
    page_size: Tokens of a page.

  Attributes:
    pages: Keys of the whole pages.
    rest: Tokens past them, as bytes.
  """

  __slots__ = ('bookmark', 'page_size', 'pages', 'rest')

  def __init__(self, tokens: Sequence[int], page_size: int):
    if page_size < 1:
      raise ValueError(f'page_size={page_size} must be at least 1')
    self.page_size = page_size
    self.pages: list[bytes] = []
    self.rest = b''
    self.bookmark: Any = None
    self.extend(tokens)

  def __len__(self) -> int:
    return len(self.pages) * self.page_size + len(self.rest) // _TOKEN

  def extend(self, tokens: Sequence[int]) -> None:
    """Appends tokens."""
    data = self.rest + array('i', tokens).tobytes()
    size = self.page_size * _TOKEN
    stop = len(data) - len(data) % size
    if stop:
      self.pages += [data[i : i + size] for i in range(0, stop, size)]
    self.rest = data[stop:]

  def update(self, tokens: Sequence[int]) -> None:
    """Appends what `tokens`, the whole sequence, has beyond these keys."""
    self.extend(tokens[len(self) :])

  def copy(self) -> 'Keys':
    """The same sequence, to be continued in another way."""
    other = Keys((), self.page_size)
    other.pages, other.rest = self.pages.copy(), self.rest
    other.bookmark = self.bookmark
    return other

  def part(self, page: int, num_tokens: int) -> bytes:
    """The first tokens of a page, fewer if the sequence ends before."""
    whole = self.pages[page] if page < len(self.pages) else self.rest
    return whole[: num_tokens * _TOKEN]


def page_keys(tokens: Sequence[int] | Keys, page_size: int) -> Keys:
  """Keys of a sequence, which may be keys already.

  Raises:
    ValueError: They are keys of pages of another size.
  """
  if not isinstance(tokens, Keys):
    return Keys(tokens, page_size)
  if tokens.page_size != page_size:
    raise ValueError(
      f'keys of pages of {tokens.page_size} tokens do not fit pages of '
      f'{page_size}'
    )
  return tokens


def num_common(a: bytes, b: bytes) -> int:
  """Tokens that two keys have in common from their start on."""
  low, high = 0, min(len(a), len(b)) // _TOKEN
  while low < high:
    middle = (low + high + 1) // 2
    if a[: middle * _TOKEN] == b[: middle * _TOKEN]:
      low = middle
    else:
      high = middle - 1
  return low


def num_tokens(key: bytes) -> int:
  """Tokens of a page's key."""
  return len(key) // _TOKEN
