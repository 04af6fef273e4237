"""Copies of a training state in the host's memory, within a budget.

DataStates-LLM (Maurya et al., "DataStates-LLM: Lazy Asynchronous Checkpointing
for Large Language Models", https://arxiv.org/abs/2406.10707): the state does
not change between one update and the next, so its copies to the host overlap
the forward and backward passes in between. Written from the abstract and from
memory of the paper.

The copies are JAX arrays of the memory kind 'pinned_host'. The runtime orders a
program that is given an original to overwrite (donation) after the copy, so
that no copy is ever torn; what has not been handed to the runtime yet is waited
for (`Staging.wait_copied`). An array that several devices hold is copied in
parts, one from each, as orbax's replica-parallel saving does, so that the host
holds it once.

Deviation: the paper has one circular buffer of pinned memory that is allocated
once; here the runtime allocates, and the budget bounds the sum.
"""

import collections
from collections.abc import Sequence
import dataclasses
import functools
import math
import os
import threading
import time
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoints import abstract

_HOST = 'pinned_host'


def to_host(state: Any) -> Any:
  """Starts to copy `state` to its devices' hosts; returns at once.

  Args:
    state: Pytree of arrays (random keys too, which become integers).

  Returns:
    Tree of the structure of `state`; arrays are sharded by `host_sharding`.
    Leaves that are no `jax.Array` are as they were.
  """
  leaves, structure = jax.tree.flatten(abstract.without_keys(state))
  where = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
  arrays = _without_replicas([leaves[i] for i in where])
  # One call: a call for each leaf takes five times as long.
  copies = jax.device_put(
    arrays, [x.sharding.with_memory_kind(_HOST) for x in arrays]
  )
  for i, copy in zip(where, copies, strict=True):
    leaves[i] = copy
  return jax.tree.unflatten(structure, leaves)


def host_sharding(array: Any) -> jax.sharding.Sharding:
  """How a copy is sharded: as the array, replicas split where they divide it.

  Args:
    array: Array or `ShapeDtypeStruct` with a sharding.
  """
  return _split_replicas(array).with_memory_kind(_HOST)


@dataclasses.dataclass(eq=False)
class Group:
  """Leaves that are copied together and flushed together.

  Attributes:
    originals: On the devices; `None` once the copies have begun.
    num_leaves: How many there are.
    num_bytes: What the copies take on this host.
    copies: `None` before they have begun, and after `Staging.release`.
    error: What kept them from beginning.
  """

  originals: list[jax.Array] | None
  num_leaves: int = 0
  num_bytes: int = 0
  copies: list[jax.Array] | None = None
  error: Exception | None = None


class Staging:
  """Groups of arrays that are copied to the host in turn, as room gets free.

  Args:
    budget_bytes: Of this process; `None` is half of the memory that the host
      has free now.

  Raises:
    ValueError: A budget that is not positive.
  """

  def __init__(self, budget_bytes: int | None = None):
    if budget_bytes is not None and budget_bytes <= 0:
      raise ValueError(f'budget_bytes={budget_bytes} must be positive')
    self.budget_bytes = budget_bytes or _available_bytes() // 2
    self.used_bytes = 0
    self.peak_bytes = 0
    self._waiting: collections.deque[Group] = collections.deque()
    self._changed = threading.Condition()

  def start(self, leaves: Sequence[tuple[str, jax.Array]]) -> list[Group]:
    """Begins to copy as many of `leaves` as there is room for.

    Args:
      leaves: A name and an array each.

    Returns:
      The groups, in order; each is to be given back with `release`.

    Raises:
      ValueError: One leaf alone is above the budget; nothing has begun then.
    """
    groups = self._grouped(leaves)
    with self._changed:
      self._waiting.extend(groups)
      self._advance()
    return groups

  def wait_copied(self) -> float:
    """Waits until the originals may be donated; returns the seconds it took.

    They may while the copies are still on their way: the runtime knows of them.
    """
    began = time.perf_counter()
    with self._changed:
      self._changed.wait_for(lambda: not self._waiting)
    return time.perf_counter() - began

  def take(self, group: Group) -> list[jax.Array]:
    """Waits until the copies of a group have begun, and returns them.

    Raises:
      Exception: What kept them from beginning.
    """
    with self._changed:
      self._changed.wait_for(lambda: group not in self._waiting)
    if group.error is not None:
      raise group.error
    return group.copies

  def release(self, group: Group) -> None:
    """Gives the room of a group to those that wait."""
    with self._changed:
      if group in self._waiting:
        self._waiting.remove(group)
        group.originals = None
      elif group.copies is not None:
        group.copies = None
        self.used_bytes -= group.num_bytes
      self._advance()

  def _grouped(self, leaves):
    # Two halves: one is copied while the other is flushed.
    groups, half = [], self.budget_bytes // 2
    for name, array in leaves:
      num_bytes = _local_bytes(array)
      if num_bytes > self.budget_bytes:
        raise ValueError(
          f'{name} takes {num_bytes / 2**30:.3g} GiB of this host, more than '
          f'the {self.budget_bytes / 2**30:.3g} GiB of staging memory; give '
          'more with staging_gib'
        )
      if not groups or groups[-1].num_bytes + num_bytes > half:
        groups.append(Group([]))
      groups[-1].originals.append(array)
      groups[-1].num_leaves += 1
      groups[-1].num_bytes += num_bytes
    return groups

  def _advance(self):
    """Begins the copies of the groups that fit. Holds the lock."""
    while self._waiting:
      group = self._waiting[0]
      if self.used_bytes + group.num_bytes > self.budget_bytes:
        break
      self._waiting.popleft()
      originals, group.originals = group.originals, None
      try:
        group.copies = to_host(originals)
      except Exception as e:  # Of a thread; whoever takes the group raises it.
        group.error = e
        continue
      self.used_bytes += group.num_bytes
      self.peak_bytes = max(self.peak_bytes, self.used_bytes)
    self._changed.notify_all()


def _local_bytes(array):
  shape = host_sharding(array).shard_shape(array.shape)
  shards = len(array.sharding.addressable_devices)
  return shards * math.prod(shape) * array.dtype.itemsize


def _without_replicas(arrays):
  """`arrays` in `_split_replicas`; every device keeps a part of what it has."""
  wanted = [_split_replicas(x) for x in arrays]
  where = [
    i
    for i, x in enumerate(arrays)
    if not x.sharding.is_equivalent_to(wanted[i], x.ndim)
  ]
  if where:
    parts = _splitter(tuple(wanted[i] for i in where))(
      [arrays[i] for i in where]
    )
    arrays = list(arrays)
    for i, part in zip(where, parts, strict=True):
      arrays[i] = part
  return arrays


@functools.lru_cache(maxsize=64)
def _splitter(shardings):
  # No device needs another's part: the program has no communication.
  return jax.jit(lambda arrays: arrays, out_shardings=list(shardings))


def _split_replicas(array):
  sharding = array.sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  mesh, spec = sharding.mesh, sharding.spec
  dims = [_axes(s) for s in spec] + [()] * (len(array.shape) - len(spec))
  used = {a for axes in dims for a in axes}
  free = tuple(a for a in mesh.axis_names if a not in used)
  replicas = math.prod(mesh.shape[a] for a in free)
  if replicas == 1:
    return sharding
  for i, size in enumerate(sharding.shard_shape(array.shape)):
    if size and size % replicas == 0:
      dims[i] += free
      return NamedSharding(mesh, P(*dims))
  return sharding


def _axes(entry):
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def _available_bytes():
  try:
    with open('/proc/meminfo') as f:
      for line in f:
        if line.startswith('MemAvailable:'):
          return int(line.split()[1]) * 1024
  except OSError:
    pass
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
