"""Time of copies, and the semaphores that tell of their end.

One pipe to HBM, shared by reads and writes, first come first served: a copy
holds it for bytes / bandwidth and is complete a fixed latency after its last
byte. Copies inside a core have a pipe of their own.
"""

from collections.abc import Callable
import heapq

from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.values import ScheduleError

# Copies that do not touch HBM; guesses, of no weight in any kernel so far.
_LOCAL_BYTES_PER_CYCLE = 1024.0
_LOCAL_LATENCY = 200.0


class DmaEngine:
  """The copies of one core.

  Attributes:
    bytes: Moved so far, by route: 'hbm_read', 'hbm_write', 'local'.
    count: Copies started.
  """

  def __init__(self, chip: Chip, active_cores: int):
    """`active_cores` share the device's HBM evenly."""
    self._timing = chip.dma
    self._bytes_per_cycle = chip.dma.bytes_per_cycle / active_cores
    self._hbm_free = 0.0
    self._local_free = 0.0
    self.bytes = {'hbm_read': 0, 'hbm_write': 0, 'local': 0}
    self.count = 0

  def start(self, now: float, num_bytes: int, route: str) -> float:
    """Starts a copy and returns when it will be complete.

    Args:
      now: Cycle.
      num_bytes: Its size.
      route: A key of `bytes`, or 'hbm_both' from HBM to HBM.
    """
    self.count += 1
    if route == 'local':
      self.bytes['local'] += num_bytes
      rate = max(_LOCAL_BYTES_PER_CYCLE, self._bytes_per_cycle)
      self._local_free = max(now, self._local_free) + num_bytes / rate
      return self._local_free + _LOCAL_LATENCY
    passes = 1
    if route == 'hbm_both':
      self.bytes['hbm_read'] += num_bytes
      self.bytes['hbm_write'] += num_bytes
      passes = 2
    else:
      self.bytes[route] += num_bytes
    cycles = max(passes * num_bytes / self._bytes_per_cycle, 1.0)
    self._hbm_free = max(now, self._hbm_free) + cycles
    writes = route == 'hbm_write'
    return self._hbm_free + (
      self._timing.write_latency if writes else self._timing.read_latency
    )


class Semaphores:
  """Counters that copies add to when they complete."""

  def __init__(self):
    self._values = {}
    self._pending = {}

  def add_at(self, address: int, when: float, amount: int) -> None:
    """Adds at a time to come."""
    heapq.heappush(self._pending.setdefault(address, []), (when, amount))

  def value(self, address: int, now: float) -> int:
    """The counter at cycle `now`."""
    pending = self._pending.get(address)
    while pending and pending[0][0] <= now:
      amount = heapq.heappop(pending)[1]
      self._values[address] = self._values.get(address, 0) + amount
    return self._values.get(address, 0)

  def set(self, address: int, value: int, now: float) -> None:
    """Sets the counter at cycle `now`."""
    self.value(address, now)
    self._values[address] = value

  def wait(
    self, address: int, now: float, is_done: Callable[[int], bool], where: str
  ) -> float:
    """Returns the cycle at which `is_done` of the counter becomes true.

    Raises:
      ScheduleError: It never does.
    """
    value = self.value(address, now)
    while not is_done(value):
      pending = self._pending.get(address)
      if not pending:
        raise ScheduleError(
          f'{where} waits for ever: semaphore {address} holds {value} and '
          'nothing is under way'
        )
      when, amount = heapq.heappop(pending)
      now = max(now, when)
      value = self._values[address] = self._values.get(address, 0) + amount
    return now
