"""KV on the host: a second tier of the prefix cache, and swapped requests.

Shen et al., "FastSwitch: Optimizing Context Switching Efficiency in
Fairness-aware Large Language Model Serving", https://arxiv.org/abs/2411.18424:
copies are few and large, run beside the computation, and are not made again
while the host still has one. Deviations: pages stay scattered in the pool, as
one gather on the device makes one transfer of them; whether to swap at all is
decided by expected time, between the two ways of Kwon et al.,
https://arxiv.org/abs/2309.06180, section 4.5.

Nothing here touches a device. A *handle* is what a copy to the host gives as it
starts; its `wait()` returns the arrays. Handles are dropped once that is done,
as they hold memory on the device.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol
import weakref

import numpy as np


class Handle(Protocol):
  """A copy to the host, under way."""

  @property
  def is_ready(self) -> bool:
    """Whether `wait` would return at once."""

  def wait(self) -> Any:
    """The arrays."""


@dataclasses.dataclass(frozen=True)
class Arrived:
  """A handle of what is on the host already."""

  arrays: Any
  is_ready = True

  def wait(self) -> Any:
    return self.arrays


def first_dim(arrays: Any, index: int) -> Any:
  """One page of arrays whose first dim counts pages; a copy."""
  if isinstance(arrays, tuple | list):
    return tuple(first_dim(x, index) for x in arrays)
  return np.array(arrays[index])


class HostPage:
  """One page in host memory, or on its way there."""

  __slots__ = ('__weakref__', '_arrays', '_batch')

  def __init__(self, batch: '_Batch'):
    self._batch: _Batch | None = batch
    self._arrays: Any = None

  def wait(self) -> Any:
    """The page's arrays, as `HostTier`'s `pick` gives them."""
    if self._batch is not None:
      self._batch.settle()
    return self._arrays

  def fill(self, arrays: Any) -> None:
    """The copy has arrived."""
    self._arrays, self._batch = arrays, None


class _Batch:
  """Pages that travel together, and are parted when they arrive.

  Whole batches cannot be kept: they would live as long as their last page.
  """

  def __init__(self, handle, pick):
    self._handle = handle
    self._pick = pick
    self.pages: list[weakref.ref[HostPage]] = []

  @property
  def is_settled(self):
    return self._handle is None

  @property
  def is_ready(self):
    return self.is_settled or self._handle.is_ready

  def settle(self):
    if self.is_settled:
      return
    arrays, self._handle = self._handle.wait(), None
    for i, ref in enumerate(self.pages):
      if (page := ref()) is not None:
        page.fill(self._pick(arrays, i))


class HostTier:
  """Host memory for pages that leave the device; least recently used first.

  Args:
    capacity_bytes: Host memory to use.
    page_bytes: Size of a page, all layers, keys and values.
    read: Starts a copy of pages to the host, before anything that is
      dispatched later can overwrite them.
    pick: One page, by its index, of what the handle's `wait` returns. It must
      not be a view of the rest.
    max_in_flight: Copies under way at most; one more waits for the oldest.

  Attributes:
    num_pages: Pages there is room for.
    on_drop: Told the owner of each page that is dropped for lack of room.
    num_copied: Pages copied from the device so far.
    num_dropped: Pages dropped for lack of room.
  """

  def __init__(
    self,
    capacity_bytes: int,
    page_bytes: int,
    read: Callable[[list[int]], Handle],
    pick: Callable[[Any, int], Any] = first_dim,
    max_in_flight: int = 4,
  ):
    if not 0 < page_bytes <= capacity_bytes:
      raise ValueError(
        f'capacity_bytes={capacity_bytes} must hold one page of '
        f'page_bytes={page_bytes} at least'
      )
    self.num_pages = capacity_bytes // page_bytes
    self._page_bytes = page_bytes
    self._read = read
    self._pick = pick
    self._max_in_flight = max_in_flight
    self._owners: OrderedDict[HostPage, Any] = OrderedDict()
    self._pending: list[_Batch] = []
    self.on_drop: Callable[[Any], None] = lambda owner: None
    self.num_copied = 0
    self.num_dropped = 0

  def __len__(self) -> int:
    return len(self._owners)

  def __contains__(self, page: HostPage) -> bool:
    return page in self._owners

  @property
  def num_bytes(self) -> int:
    """Host memory in use."""
    return len(self) * self._page_bytes

  def store(self, pages: list[int], owners: Sequence[Any]) -> list[HostPage]:
    """Starts to copy pages here, in place of the least recently used ones.

    Args:
      pages: Numbers on the device, `num_pages` at most; the most useful last.
      owners: What `on_drop` is to be told, one per page.

    Returns:
      Where they will be.
    """
    assert len(pages) <= self.num_pages
    self.settle(only_ready=True)
    if len(self._pending) >= self._max_in_flight:
      self._pending.pop(0).settle()
    while len(self) + len(pages) > self.num_pages:
      _, owner = self._owners.popitem(last=False)
      self.num_dropped += 1
      self.on_drop(owner)  # May remove more.
    batch = _Batch(self._read(pages), self._pick)
    self._pending.append(batch)
    stored = [HostPage(batch) for _ in pages]
    batch.pages = [weakref.ref(page) for page in stored]
    self._owners.update(zip(stored, owners, strict=True))
    self.num_copied += len(pages)
    return stored

  def touch(self, pages: Sequence[HostPage]) -> None:
    """These are used: the last one will be dropped last."""
    for page in pages:
      self._owners.move_to_end(page)

  def remove(self, page: HostPage) -> None:
    """Forgets a page. Who still has it may use it once more."""
    del self._owners[page]

  def clear(self) -> None:
    """Forgets all pages; `on_drop` is not told."""
    self._owners.clear()
    self._pending = []

  def settle(self, only_ready: bool = False) -> None:
    """Takes over copies that have arrived; waits for the rest by default."""
    for batch in self._pending:
      if batch.is_ready or not only_ready:
        batch.settle()
    self._pending = [b for b in self._pending if not b.is_settled]


class SwapSpace:
  """Host memory for the pages of preempted requests.

  Args:
    capacity_bytes: Host memory to use.
  """

  def __init__(self, capacity_bytes: int):
    self.capacity_bytes = capacity_bytes
    self.num_bytes = 0
    self._held: dict[int, tuple[Handle, int]] = {}

  def __len__(self) -> int:
    return len(self._held)

  def __contains__(self, request_id: int) -> bool:
    return request_id in self._held

  def has_room(self, num_bytes: int) -> bool:
    return self.num_bytes + num_bytes <= self.capacity_bytes

  def put(self, request_id: int, handle: Handle, num_bytes: int) -> None:
    """Keeps a request's pages, which may still be on their way.

    Raises:
      ValueError: There is no room, or the request is here already.
    """
    if request_id in self._held:
      raise ValueError(f'request {request_id} is swapped out already')
    if not self.has_room(num_bytes):
      raise ValueError(
        f'request {request_id} needs {num_bytes} bytes of swap space, but '
        f'{self.num_bytes} of {self.capacity_bytes} are in use'
      )
    self._held[request_id] = handle, num_bytes
    self.num_bytes += num_bytes

  def pop(self, request_id: int) -> Handle:
    """Gives a request's pages back, and their room up.

    Raises:
      KeyError: It has none here.
    """
    handle, num_bytes = self._held.pop(request_id)
    self.num_bytes -= num_bytes
    return handle

  def settle(self, only_ready: bool = False) -> None:
    """Takes over copies that have arrived; waits for the rest by default."""
    for request_id, (handle, num_bytes) in self._held.items():
      if handle.is_ready or not only_ready:
        if not isinstance(handle, Arrived):
          self._held[request_id] = Arrived(handle.wait()), num_bytes


class Rate:
  """Running estimate of an amount per second, recent samples first.

  Amounts and times are averaged apart, each with exponentially falling weights,
  so that a sample counts by its size.

  Args:
    initial: Returned until there is a sample.
    decay: Weight of a sample relative to the one after it.
  """

  def __init__(self, initial: float | None = None, decay: float = 0.9):
    if not 0 <= decay < 1:
      raise ValueError(f'decay={decay} must be in [0, 1)')
    self._initial = initial
    self._decay = decay
    self._amount = 0.0
    self._seconds = 0.0

  @property
  def per_s(self) -> float | None:
    if self._seconds == 0:
      return self._initial
    return self._amount / self._seconds

  def observe(self, amount: float, seconds: float) -> None:
    """Adds a sample; empty ones, or ones that took no time, are ignored."""
    if amount > 0 and seconds > 0:
      self._amount = self._decay * self._amount + amount
      self._seconds = self._decay * self._seconds + seconds


def swap_is_cheaper(
  num_tokens: int,
  bytes_per_token: float,
  prefill_tokens_per_s: float,
  bytes_per_s: float,
) -> bool:
  """Whether a request comes back sooner by swapping than by computing again.

  Args:
    num_tokens: Tokens in its pages.
    bytes_per_token: Of keys and values, all layers.
    prefill_tokens_per_s: Speed of computing them.
    bytes_per_s: Speed of a copy between device and host; there are two.
  """
  swap_s = 2 * num_tokens * bytes_per_token / bytes_per_s
  return swap_s < num_tokens / prefill_tokens_per_s


class TransferCosts:
  """`swap_is_cheaper` with speeds as they are seen.

  The engine calls `prefill.observe(tokens, seconds)` after steps that computed
  prompts, and `copy.observe(bytes, seconds)` after waiting for a copy.

  Args:
    bytes_per_s: Assumed until a copy has been timed.
  """

  def __init__(self, bytes_per_s: float = 8e9):
    self.prefill = Rate()
    self.copy = Rate(bytes_per_s)

  def swap_is_cheaper(self, num_tokens: int, bytes_per_token: float) -> bool:
    """False while nothing is known about the speed of computing."""
    if self.prefill.per_s is None:
      return False
    return swap_is_cheaper(
      num_tokens, bytes_per_token, self.prefill.per_s, self.copy.per_s
    )
