"""Memory that a keeper shares with a trainer, used again and again."""

import itertools
import mmap
import os
import threading

import numpy as np


class Slot:
  """Memory without a name, gone when nobody has it open. Linux only.

  Attributes:
    number: Different for every slot of a process.
    fd: Open file, to be sent to whoever should map it.
    bytes: uint8 `[num_bytes]`.
  """

  _numbers = itertools.count()

  def __init__(self, num_bytes: int):
    self.number = next(Slot._numbers)
    self.fd = os.memfd_create(f'snapshot-{self.number}')
    os.ftruncate(self.fd, max(num_bytes, 1))
    self.bytes = map_slot(self.fd, num_bytes)

  def close(self) -> None:
    """Gives the memory back, once nobody has it mapped."""
    os.close(self.fd)
    self.bytes = None


def map_slot(fd: int, num_bytes: int) -> np.ndarray:
  """The memory of an open file, uint8 `[num_bytes]`, unmapped with the array.

  Fresh pages are touched by whoever is first; slots are used again because
  that costs more than the copy into them.
  """
  if not num_bytes:
    return np.zeros(0, np.uint8)
  return np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)


class SlotPool:
  """Slots and buffers of dropped versions, for the next one."""

  def __init__(self):
    self._lock = threading.Lock()
    self._free: list[Slot] = []

  def take(self, num_bytes: int) -> Slot:
    """A slot with anything in it."""
    with self._lock:
      for slot in self._free:
        if slot.bytes.size == num_bytes:
          self._free.remove(slot)
          return slot
    return Slot(num_bytes)

  def trim(self, sizes: set[int]) -> None:
    """Gives back slots of other sizes, for the layout has changed."""
    with self._lock:
      for slot in self._free:
        if slot.bytes.size not in sizes:
          slot.close()
      self._free = [slot for slot in self._free if slot.bytes is not None]

  def give(self, slot: Slot) -> None:
    """Keeps `slot` for the next `take`."""
    with self._lock:
      self._free.append(slot)
