"""What one keeper holds: versions of its part, parity of others, what counts.

A version is one snapshot, `(generation, step)`; later ones are greater. It has

* the bytes of this keeper's trainer, once it has said that they are whole;
* this keeper's rows of parity, complete when every other member's chunks have
  been added;
* the headers of all members, small, so that no loss takes them away.

It is prepared here when all of that is there, and committed once at most
`num_parity` members are not known to have it prepared. Only a committed version
lets older ones go: at every moment there is one that all can go back to.
"""

import contextlib
import dataclasses
import threading
from typing import Any

import numpy as np

from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory import parity
from jaxtrain.checkpoints.in_memory.slots import Slot
from jaxtrain.checkpoints.in_memory.slots import SlotPool
from jaxtrain.checkpoints.in_memory.stripes import Stripes

VersionId = tuple[int, int]
_BREAK_OFF_S = 5.0


@dataclasses.dataclass(frozen=True)
class Group:
  """The keepers of a version.

  Attributes:
    members: 'host:port' of each, by its number.
    num_parity: Rows of parity: how many may be lost.
    chunk_bytes: Length of every chunk.
  """

  members: tuple[str, ...]
  num_parity: int
  chunk_bytes: int

  @property
  def stripes(self) -> Stripes:
    """Who holds what."""
    return Stripes(len(self.members), self.num_parity)

  def to_json(self) -> dict[str, Any]:
    """As JSON types."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> 'Group':
    """The group that `to_json` wrote."""
    return cls(**{**value, 'members': tuple(value['members'])})


@dataclasses.dataclass(eq=False)
class Version:
  """One snapshot, as far as it has come here.

  Attributes:
    id: `(generation, step)`.
    group: Its keepers.
    index: Which of them this is.
    slot: Bytes of this keeper's trainer, once begun.
    rows: Rows of parity.
    row_checksums: Of each row, once complete.
    headers: What members say of their bytes, by member.
    receiving: Members whose chunks are coming or have come.
    received: Members whose chunks are in the parity.
    ended: Whether this keeper's own bytes are whole.
    spoiled: Whether a row is of no use, half of a chunk having come.
    prepared: Members known to be prepared.
    absent: Members whose trainer has had to do without its keeper.
    committed: Whether older versions may go.
    failed: Why it will not be, as far as this keeper can tell.
    dropped: Whether it is gone.
    readers: Who is reading just now.
  """

  id: VersionId
  group: Group
  index: int
  rows: list[Slot]
  slot: Slot | None = None
  row_checksums: list[list[int]] | None = None
  headers: dict[int, Any] = dataclasses.field(default_factory=dict)
  receiving: set[int] = dataclasses.field(default_factory=set)
  received: set[int] = dataclasses.field(default_factory=set)
  ended: bool = False
  spoiled: bool = False
  prepared: set[int] = dataclasses.field(default_factory=set)
  absent: set[int] = dataclasses.field(default_factory=set)
  committed: bool = False
  failed: str | None = None
  dropped: bool = False
  readers: int = 0

  def __post_init__(self):
    self.locks = [threading.Lock() for _ in self.rows]

  @property
  def others(self) -> set[int]:
    """The other members."""
    return set(range(len(self.group.members))) - {self.index}

  @property
  def why_failed(self) -> str | None:
    """Why it will not be committed, `None` if it may be."""
    if self.spoiled:
      return 'a member was lost while it sent'
    return self.failed

  def describe(self) -> dict[str, Any]:
    """Its state as JSON types."""
    return {
      'version': self.id,
      'group': self.group.to_json(),
      'index': self.index,
      'has_data': self.ended,
      'has_parity': self.row_checksums is not None,
      'headers': sorted(self.headers),
      'committed': self.committed,
    }


class Versions:
  """All versions of a keeper. Its methods may be called from any thread.

  Args:
    keep: How many committed versions to keep. Besides them there is room for
      the one being written.
  """

  def __init__(self, keep: int = 2):
    if keep < 1:
      raise ValueError(f'keep={keep} must be at least 1')
    self._keep = keep
    self._versions: dict[VersionId, Version] = {}
    self._pool = SlotPool()
    self.changed = threading.Condition()

  def begin(self, version_id: VersionId, group: Group, index: int) -> Version:
    """Makes room for the bytes of this keeper's trainer.

    What older versions are not prepared never will be, and goes.

    Raises:
      ValueError: There is a later one, or this one has been begun.
    """
    with self.changed:
      latest = max(
        (v.id for v in self._versions.values() if v.slot is not None),
        default=None,
      )
      if latest is not None and latest >= version_id:
        raise ValueError(
          f'generation {version_id[0]} step {version_id[1]} does not come '
          f'after generation {latest[0]} step {latest[1]}, which is here'
        )
      open_ids = sorted(
        v.id
        for v in self._versions.values()
        if v.id < version_id and not v.committed
      )
      for i in open_ids:
        v = self._versions[i]
        # A prepared one may count elsewhere, where an older one is gone.
        if v.index not in v.prepared or i in open_ids[: -self._keep]:
          self._drop(v)
      version = self._get(version_id, group, index)
      size = group.stripes.num_data * group.chunk_bytes
      self._pool.trim({size, group.chunk_bytes})
      version.slot = self._pool.take(size)
      return version

  def end(self, version: Version, header: dict[str, Any]) -> None:
    """Notes that the bytes of this keeper's trainer are whole."""
    with self.changed:
      version.ended = True
      version.headers[version.index] = header
      self._check_prepared(version)

  def contribution(
    self, version_id: VersionId, group: Group, index: int
  ) -> Version:
    """The version that chunks of another member belong to.

    Raises:
      ValueError: They come too late.
    """
    with self.changed:
      latest = max(
        (v.id for v in self._versions.values() if v.committed), default=None
      )
      if version_id not in self._versions and latest is not None:
        if version_id < latest:
          raise ValueError(
            f'step {version_id[1]} comes too late, after step {latest[1]}'
          )
      return self._get(version_id, group, index)

  def start_receiving(self, version: Version, sender: int) -> None:
    """Notes that a member's chunks are coming.

    Raises:
      ValueError: They have come before; twice, they would undo themselves.
    """
    with self.changed:
      if sender in version.receiving:
        raise ValueError(f'member {sender} has sent its chunks before')
      version.receiving.add(sender)

  def stand_in(self, version: Version, sender: int) -> bool:
    """Notes that a member's trainer goes on without its keeper.

    Returns:
      Whether the keeper had sent all that it should.
    """
    with self.changed:
      version.absent.add(sender)
      self.changed.notify_all()
      # The keeper is gone: what it was sending will soon break off.
      self.changed.wait_for(
        lambda: (
          sender not in version.receiving
          or sender in version.received
          or version.spoiled
        ),
        _BREAK_OFF_S,
      )
      return sender in version.receiving

  def add(
    self, version: Version, row: int, offset: int, part: np.ndarray, factor: int
  ) -> None:
    """Adds a part of another member's chunk to a row of parity.

    Args:
      version: Of `contribution`.
      row: Which of this keeper's rows.
      offset: Where in the row.
      part: uint8 `[bytes]`.
      factor: The code's coefficient.
    """
    with version.locks[row]:
      if not version.dropped:
        into = version.rows[row].bytes[offset : offset + part.size]
        parity.accumulate(into, part, factor)

  def received(self, version: Version, sender: int, header: Any) -> None:
    """Notes that all of a member's chunks have been added.

    Args:
      version: Of `contribution`.
      sender: The member.
      header: What it says of its bytes.
    """
    with self.changed:
      version.received.add(sender)
      version.headers[sender] = header
      self.changed.notify_all()
      if version.received != version.others or version.spoiled:
        return
      if version.dropped:
        return
      version.readers += 1
    sums = [checksums.of_chunk(row.bytes) for row in version.rows]
    with self.changed:
      self._release(version)
      version.row_checksums = sums
      self._check_prepared(version)

  def spoil(self, version: Version) -> None:
    """Notes that a member's chunk came in part: the parity is of no use."""
    with self.changed:
      version.spoiled = True
      self.changed.notify_all()

  def note_prepared(self, version_id: VersionId, member: int) -> None:
    """Notes that another member has everything of a version."""
    with self.changed:
      if version := self._versions.get(version_id):
        version.prepared.add(member)
        self.changed.notify_all()

  def commit(self, version: Version) -> None:
    """Lets older versions go."""
    with self.changed:
      version.committed = True
      kept = sorted(v.id for v in self._versions.values() if v.committed)
      oldest = kept[-self._keep :][0]
      for v in list(self._versions.values()):
        if v.id < oldest or (v.id < version.id and not v.committed):
          self._drop(v)
      self.changed.notify_all()

  def fail(self, version: Version, why: str) -> None:
    """Notes that this keeper has given up waiting for a version."""
    with self.changed:
      version.failed = why
      self.changed.notify_all()

  def find(self, version_id: VersionId) -> Version | None:
    """The version, if it is here."""
    with self.changed:
      return self._versions.get(version_id)

  def describe(self) -> list[dict[str, Any]]:
    """The state of all versions, as JSON types."""
    with self.changed:
      return [v.describe() for _, v in sorted(self._versions.items())]

  def close(self) -> None:
    """Lets everything go."""
    with self.changed:
      for version in list(self._versions.values()):
        self._drop(version)
      self._pool.trim(set())
      self.changed.notify_all()

  @contextlib.contextmanager
  def reading(self, version_id: VersionId):
    """The version, whose memory stays as it is for the time being.

    Raises:
      ValueError: It is not here.
    """
    with self.changed:
      version = self._versions.get(version_id)
      if version is None:
        raise ValueError(
          f'generation {version_id[0]} step {version_id[1]} is not here'
        )
      version.readers += 1
    try:
      yield version
    finally:
      with self.changed:
        self._release(version)

  def _get(self, version_id, group, index):
    version = self._versions.get(version_id)
    if version is None:
      rows = [
        self._pool.take(group.chunk_bytes) for _ in range(group.num_parity)
      ]
      for row in rows:
        row.bytes[:] = 0
      version = Version(version_id, group, index, rows)
      self._versions[version_id] = version
    elif (version.group, version.index) != (group, index):
      raise ValueError(
        f'step {version_id[1]}: members of one version disagree about their '
        'group'
      )
    return version

  def _check_prepared(self, version):
    if version.ended and version.row_checksums is not None:
      version.prepared.add(version.index)
    self.changed.notify_all()

  def _drop(self, version):
    del self._versions[version.id]
    for lock in version.locks:
      lock.acquire()
    version.dropped = True
    for lock in version.locks:
      lock.release()
    if not version.readers:
      self._recycle(version)

  def _release(self, version):
    version.readers -= 1
    if version.dropped and not version.readers:
      self._recycle(version)

  def _recycle(self, version):
    if version.slot is not None and version.ended:
      self._pool.give(version.slot)
    elif version.slot is not None:
      # A trainer that only seemed dead may still write there.
      version.slot.close()
    for row in version.rows:
      self._pool.give(row)
