"""One member's side of making a version count: sends chunks, then waits.

A trainer whose keeper is gone does this itself, with its own bytes: the version
then has that member's part as parity only, which costs one of the losses that
it could have survived.
"""

from collections.abc import Callable
import threading
import time
from typing import Any

import numpy as np

from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.versions import Group
from jaxtrain.checkpoints.in_memory.versions import VersionId

_PING_EVERY_S = 0.1
_MAY_YET = ''


class Exchange:
  """Connections of one member to the others, for one version.

  Args:
    version_id: `(generation, step)`.
    group: Its keepers.
    index: The member whose bytes these are.
    timeout_s: After how long without an answer a keeper counts as gone.
  """

  def __init__(
    self, version_id: VersionId, group: Group, index: int, timeout_s: float
  ):
    self._id = version_id
    self._group = group
    self._index = index
    self._timeout_s = timeout_s
    self._peers: dict[int, wire.Peer] = {}
    self.absent: dict[int, str] = {}  # Member: why.
    self.failed: dict[int, str] = {}  # Of those that are there.

  def contribute(self, header: dict[str, Any], data: np.ndarray) -> None:
    """Sends every other member the header, and the chunks for its parity.

    Args:
      header: What `InMemorySnapshots` says of the bytes.
      data: The bytes, uint8; what is missing of the last chunk is zeros.
    """
    self._each(lambda index: self._contribute(index, header, data))

  def _contribute(self, index, header, data):
    used = header['num_bytes']
    chunks, buffers = [], []
    for chunk, row in self._group.stripes.chunks_for(self._index, index):
      start = chunk * self._group.chunk_bytes
      stop = max(start, min(start + self._group.chunk_bytes, used))
      chunks.append((chunk, row, stop - start))
      buffers.append(memoryview(data[start:stop]))
    message = {
      'op': 'contribute',
      'version': self._id,
      'group': self._group.to_json(),
      'sender': self._index,
      'receiver': index,
      'header': header,
      'chunks': chunks,
    }
    self._to(index).ask(message, buffers)

  def _to(self, index):
    if index not in self._peers:
      address = self._group.members[index]
      self._peers[index] = wire.Peer(
        address, wire.connect(address, self._timeout_s)
      )
    return self._peers[index]

  def stand_in(self, header: dict[str, Any], data: np.ndarray) -> None:
    """`contribute` for a member that is gone, to whom it has not reached.

    Args:
      header: See `contribute`.
      data: See `contribute`.
    """
    message = {
      'op': 'stand_in',
      'version': self._id,
      'group': self._group.to_json(),
      'sender': self._index,
    }

    def one(index):
      answer, _ = self._to(index).ask({**message, 'receiver': index})
      if not answer['has_received']:
        self._contribute(index, header, data)

    self._each(one)

  def announce(self) -> None:
    """Tells the others that this member has everything."""
    message = {
      'op': 'prepared',
      'version': self._id,
      'sender': self._index,
    }
    self._each(lambda index: self._to(index).ask(message))

  def ping(self, members: set[int]) -> set[int]:
    """Asks the given members how they are; returns who has committed."""
    committed = set()

    def one(index):
      message = {'op': 'ping', 'version': self._id}
      answer, _ = self._to(index).ask(message)
      if not answer['is_known']:
        raise wire.WireError('it knows of no such step (any more)')
      if answer['is_committed']:
        committed.add(index)
      if answer['failed']:
        address = self._group.members[index]
        self.failed[index] = f'keeper {address}: {answer["failed"]}'

    self._each(one, members)
    return committed

  def close(self) -> None:
    """Closes the connections."""
    for peer in self._peers.values():
      peer.close()

  def _each(self, do: Callable[[int], None], members: set[int] | None = None):
    """Calls `do` for members that are not absent; who fails becomes so."""

    def one(index):
      try:
        do(index)
      except wire.WireError as e:
        self.absent[index] = str(e)

    if members is None:
      members = set(range(len(self._group.members))) - {self._index}
    threads = [
      threading.Thread(target=one, args=(i,), daemon=True)
      for i in sorted(members - set(self.absent))
    ]
    for t in threads:
      t.start()
    for t in threads:
      t.join()


def run_for_keeper(versions, version, header, timeout_s) -> dict[str, Any]:
  """Makes a version count whose bytes are whole; a keeper's thread waits here.

  Args:
    versions: `Versions` of the keeper.
    version: Whose `end` has been called.
    header: That was given to `end`.
    timeout_s: When to give up; the versions before stay.

  Returns:
    'is_committed', 'absent' (addresses and why), 'reason' if not committed.
  """
  group, index = version.group, version.index
  exchange = Exchange(version.id, group, index, timeout_s)
  announced = False
  try:
    exchange.contribute(header, version.slot.bytes)
    deadline = time.monotonic() + timeout_s
    while True:
      if index in version.prepared and not announced:
        announced = True
        exchange.announce()
      with versions.changed:
        reason = _why_not(version, exchange, announced)
        if reason is None:
          versions.commit(version)
        if reason != _MAY_YET:
          break
        seen = versions.changed.wait(_PING_EVERY_S)
      if time.monotonic() > deadline:
        reason = _late(version)
        break
      if not seen:
        exchange.ping(version.others - version.prepared - version.absent)
  finally:
    exchange.close()
  if reason is not None:
    versions.fail(version, reason)
  absent = {group.members[i]: why for i, why in exchange.absent.items()}
  for i in version.absent:
    absent[group.members[i]] = 'its trainer does without it'
  return {
    'is_committed': version.committed,
    'absent': absent,
    'reason': reason,
  }


def _why_not(version, exchange, announced):
  """`None` if the version counts, `_MAY_YET`, or why it never will."""
  if version.dropped:
    return 'a later step was begun'
  if version.spoiled:
    return 'a member was lost while it sent'
  if exchange.failed:
    return '; '.join(exchange.failed.values())
  absent = set(exchange.absent) | version.absent
  num_parity = version.group.num_parity
  missing = version.others - version.prepared
  if announced and missing <= absent and len(missing) <= num_parity:
    return None
  if len(absent) > num_parity:
    return f'{len(absent)} keepers are gone, and {num_parity} may'
  return _MAY_YET


def _late(version):
  silent = version.others - version.received
  waiting = silent or version.others - version.prepared
  return 'waited too long for ' + ', '.join(
    version.group.members[i] for i in sorted(waiting)
  )


def run_for_trainer(
  version_id: VersionId,
  group: Group,
  index: int,
  header: dict[str, Any],
  data: np.ndarray,
  timeout_s: float,
) -> dict[str, Any]:
  """The same for a trainer whose keeper is gone, maybe having sent a part."""
  exchange = Exchange(version_id, group, index, timeout_s)
  others = set(range(len(group.members))) - {index}
  try:
    exchange.stand_in(header, data)
    deadline = time.monotonic() + timeout_s
    reason = _MAY_YET
    while reason == _MAY_YET:
      living = others - set(exchange.absent)
      if len(others) - len(living) + 1 > group.num_parity:
        reason = (
          f'{len(others) - len(living) + 1} keepers are gone, and '
          f'{group.num_parity} may'
        )
      elif exchange.ping(living):
        reason = None  # One that has committed knows that all can.
      elif exchange.failed:
        reason = '; '.join(exchange.failed.values())
      elif time.monotonic() > deadline:
        reason = 'waited too long for the others'
      else:
        time.sleep(_PING_EVERY_S / 4)
  finally:
    exchange.close()
  absent = {group.members[i]: why for i, why in exchange.absent.items()}
  return {'is_committed': reason is None, 'absent': absent, 'reason': reason}
