"""Where the keys and values of live requests are."""

from jaxserve.cache.allocator import PageAllocator
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.request import Continuation
from jaxserve.engine.runner import Runner


class Memory:
  """Pages of all continuations."""

  def __init__(self, runner: Runner, config: EngineConfig, num_pages: int):
    self.page_size = config.page_size
    self.allocator = PageAllocator(num_pages)
    self.prefix = None

  @property
  def num_free(self) -> int:
    return self.allocator.num_free

  @property
  def num_held(self) -> int:
    return self.allocator.num_pages - self.num_free

  def keys(self, tokens):
    return None

  def num_cached(self, c: Continuation) -> int:
    return c.num_computed

  def place(self, c: Continuation, count: int) -> int:
    need = -(-(c.num_computed + count) // self.page_size) - len(c.pages)
    if need > self.num_free:
      return 0
    if need > 0:
      c.pages += self.allocator.take(need)
    return count

  def flush(self) -> None:
    pass

  def publish(self, c: Continuation) -> None:
    pass

  def release(self, c: Continuation, keep: bool = True) -> None:
    self.allocator.give_back(c.pages)
    c.pages = []

  def preempt(self, c: Continuation) -> None:
    self.release(c)
    c.num_computed = 0
