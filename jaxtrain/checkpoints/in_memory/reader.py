"""Finds what keepers hold, and reads it, through parity where it must.

Every block is checked against its checksum. One that is damaged counts as lost,
like those of keepers that are gone.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
import dataclasses
import threading
from typing import Any
import zlib

import numpy as np

from jaxtrain.checkpoints.in_memory import checksums
from jaxtrain.checkpoints.in_memory import parity
from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.versions import Group
from jaxtrain.checkpoints.in_memory.versions import VersionId

_RUN_BLOCKS = 32  # Of one request.
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Found:
  """A version, as its living members describe it.

  Attributes:
    id: `(generation, step)`.
    group: Its keepers.
    has_data: Members that have their own bytes.
    has_parity: Members that have their rows of parity.
    headers: Members whose headers somebody has: who.
    missing: Members that are not there: why.
  """

  id: VersionId
  group: Group
  has_data: frozenset[int]
  has_parity: frozenset[int]
  headers: Mapping[int, str]
  missing: Mapping[int, str]

  def why_not(self) -> str | None:
    """Why it cannot be read, `None` if it can."""
    members, stripes = self.group.members, self.group.stripes
    unknown = [members[i] for i in range(len(members)) if i not in self.headers]
    if unknown:
      return f'nobody knows what {", ".join(unknown)} had'
    for stripe in range(len(members)):
      lost = [
        holder
        for part in range(len(members))
        if (holder := stripes.holder(stripe, part))
        not in (self.has_data if part < stripes.num_data else self.has_parity)
      ]
      if len(lost) > self.group.num_parity:
        names = ', '.join(members[i] for i in sorted(lost))
        return f'{names} lack it, and {self.group.num_parity} may'
    return None


def find(
  addresses: Sequence[str], timeout_s: float
) -> tuple[list[Found], dict[str, str]]:
  """Asks keepers what they hold, and those that their versions name.

  Args:
    addresses: 'host:port' of keepers of which some live.
    timeout_s: For each answer.

  Returns:
    Versions, newest first, readable or not; and who did not answer: why.
  """
  described: dict[str, list[dict[str, Any]]] = {}
  silent: dict[str, str] = {}
  to_ask = set(addresses)
  while to_ask:
    with futures.ThreadPoolExecutor(len(to_ask)) as pool:
      names = sorted(to_ask)
      for name, answer in zip(
        names, pool.map(lambda a: _ask(a, timeout_s), names), strict=True
      ):
        if isinstance(answer, str):
          silent[name] = answer
        else:
          described[name] = answer
    named = {
      member
      for versions in described.values()
      for v in versions
      for member in v['group']['members']
    }
    to_ask = named - described.keys() - silent.keys()
  by_id: dict[VersionId, list[dict[str, Any]]] = {}
  for versions in described.values():
    for v in versions:
      by_id.setdefault(tuple(v['version']), []).append(v)
  found = [_merge(i, by_id[i], silent) for i in sorted(by_id, reverse=True)]
  return found, silent


def _ask(address, timeout_s):
  try:
    peer = wire.Peer(address, wire.connect(address, timeout_s))
    try:
      return peer.ask({'op': 'versions'})[0]['versions']
    finally:
      peer.close()
  except wire.WireError as e:
    return str(e)


def _merge(version_id, described, silent):
  group = Group.from_json(described[0]['group'])
  here = {v['index']: v for v in described}
  headers = {}
  for i, v in here.items():
    for j in v['headers']:
      headers.setdefault(j, group.members[i])
  missing = {
    i: silent.get(member, f'{member} has nothing of this step')
    for i, member in enumerate(group.members)
    if i not in here
  }
  return Found(
    id=version_id,
    group=group,
    has_data=frozenset(i for i, v in here.items() if v['has_data']),
    has_parity=frozenset(i for i, v in here.items() if v['has_parity']),
    headers=headers,
    missing=missing,
  )


class LostError(ValueError):
  """Bytes that no parity brings back.

  Attributes:
    member: Whose bytes.
    start: First of them.
    stop: One after the last.
  """

  def __init__(self, member: int, start: int, stop: int, why: str):
    super().__init__(why)
    self.member, self.start, self.stop = member, start, stop


class Reader:
  """Reads bytes of one version.

  Args:
    found: The version; `why_not` of it must be `None`.
    timeout_s: For each answer.

  Attributes:
    headers: Of every member.
    damaged: `(address, block)` that did not have its checksum.

  Raises:
    ValueError: A keeper went away meanwhile.
  """

  def __init__(self, found: Found, timeout_s: float):
    self.found = found
    self._group = found.group
    self._timeout_s = timeout_s
    self._local = threading.local()
    self._connections: list[wire.Peer] = []
    self._gone: dict[int, str] = dict(found.missing)
    self.damaged: set[tuple[str, str]] = set()
    self._sound: set[tuple[int, int, int]] = set()  # Blocks in `data`.
    self.headers: dict[int, dict[str, Any]] = {}
    self._row_checksums: dict[int, list[list[int]] | None] = {}
    for i in sorted(found.has_data | found.has_parity):
      try:
        answer = self._to(i).ask({'op': 'headers', 'version': found.id})[0]
      except wire.WireError as e:
        self._gone[i] = str(e)
        continue
      self._row_checksums[i] = answer['row_checksums']
      for j, header in answer['headers'].items():
        self.headers[int(j)] = header
    if len(self.headers) < len(self._group.members):
      raise ValueError(f'step {found.id[1]}: {"; ".join(self._gone.values())}')
    self.data = {
      i: np.empty(h['num_bytes'], np.uint8) for i, h in self.headers.items()
    }

  def __enter__(self) -> 'Reader':
    return self

  def __exit__(self, *error) -> None:
    for peer in self._connections:
      peer.close()

  def fetch(self, ranges: Mapping[int, Iterable[tuple[int, int]]]) -> None:
    """Fills `data` in the given ranges (and some more).

    Args:
      ranges: `{member: (start, stop) of bytes}`.

    Raises:
      LostError: Too many parts of a stripe are gone.
    """
    wanted = [
      (i, block)
      for i, spans in ranges.items()
      for block in sorted({b for span in spans for b in self._blocks(i, *span)})
    ]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      runs = pool.map(lambda run: self._fetch_run(*run), _runs(wanted))
      lost = [item for failed in runs for item in failed]
      for _ in pool.map(lambda item: self._decode(*item), lost):
        pass

  def _blocks(self, member, start, stop):
    """`(chunk, block)` that cover a range of a member's bytes."""
    length = self._group.chunk_bytes
    for chunk in range(start // length, (stop - 1) // length + 1):
      a = max(start - chunk * length, 0)
      b = min(stop - chunk * length, length)
      first = a // checksums.BLOCK_BYTES
      for block in range(first, (b - 1) // checksums.BLOCK_BYTES + 1):
        yield chunk, block

  def _bounds(self, member, chunk, block):
    """Bytes of a block among the member's; none beyond its last byte."""
    length = self._group.chunk_bytes
    start = chunk * length + block * checksums.BLOCK_BYTES
    stop = min(start + checksums.BLOCK_BYTES, (chunk + 1) * length)
    used = self.headers[member]['num_bytes']
    return min(start, used), min(stop, used)

  def _fetch_run(self, member, blocks):
    """Fetches neighbouring blocks; returns those that are lost."""
    start = self._bounds(member, *blocks[0])[0]
    stop = self._bounds(member, *blocks[-1])[1]
    into = self.data[member][start:stop]
    everything = [(member, block) for block in blocks]
    if member not in self.found.has_data or not self._read(
      member, -1, start, stop, into
    ):
      return everything
    lost = []
    for block in blocks:
      begin, end = self._bounds(member, *block)
      if self._is_sound(member, *block, self.data[member][begin:end]):
        self._sound.add((member, *block))
      else:
        lost.append((member, block))
    return lost

  def _is_sound(self, member, chunk, block, part):
    if not part.size:
      return True
    sums = self.headers[member]['checksums']
    if zlib.crc32(part) == sums[chunk][block]:
      return True
    name = self._group.members[member]
    self.damaged.add((name, f'chunk {chunk} block {block}'))
    return False

  def _read(self, member, part, start, stop, into):
    """Reads from a keeper; whether it answered."""
    if member in self._gone:
      return False
    if start == stop:
      return True
    message = {
      'op': 'read',
      'version': self.found.id,
      'part': part,
      'ranges': [(start, stop)],
    }
    try:
      self._to(member).ask(message, into=memoryview(into))
      return True
    except wire.WireError as e:
      self._gone[member] = str(e)
      return False

  def _to(self, member):
    """This thread's connection to a member."""
    if not hasattr(self._local, 'peers'):
      self._local.peers = {}
    if member not in self._local.peers:
      address = self._group.members[member]
      peer = wire.Peer(address, wire.connect(address, self._timeout_s))
      self._local.peers[member] = peer
      self._connections.append(peer)
    return self._local.peers[member]

  def _decode(self, member, place):
    """Makes a lost block out of the rest of its stripe."""
    chunk, block = place
    stripes = self._group.stripes
    stripe = stripes.stripe_of(member, chunk)
    start = block * checksums.BLOCK_BYTES
    size = min(checksums.BLOCK_BYTES, self._group.chunk_bytes - start)
    known = {}
    for part in range(len(self._group.members)):
      # Chunks first: with them, fewer products are to be made.
      if len(known) == stripes.num_data:
        break
      if part == chunk:
        continue
      if part < stripes.num_data:
        read = self._read_chunk(stripes.holder(stripe, part), part, block, size)
      else:
        row = part - stripes.num_data
        read = self._read_row(stripes.holder(stripe, part), row, start, size)
      if read is not None:
        known[part] = read
    begin, end = self._bounds(member, chunk, block)
    if len(known) < stripes.num_data:
      raise LostError(member, begin, end, self._losses(stripe, known))
    solved = parity.decode(known, stripes.num_data, stripes.num_parity)[chunk]
    solved = solved[: end - begin]
    if not self._is_sound(member, chunk, block, solved):
      raise LostError(
        member, begin, end, 'what parity gives does not have its checksum'
      )
    self.data[member][begin:end] = solved

  def _read_chunk(self, member, chunk, block, size):
    start, stop = self._bounds(member, chunk, block)
    read = np.zeros(size, np.uint8)
    used = read[: stop - start]
    if (member, chunk, block) in self._sound:
      used[:] = self.data[member][start:stop]
      return read
    if used.size and member not in self.found.has_data:
      return None
    if not self._read(member, -1, start, stop, used):
      return read if not used.size else None
    return read if self._is_sound(member, chunk, block, used) else None

  def _read_row(self, member, row, start, size):
    sums = self._row_checksums.get(member)
    if sums is None:
      return None
    read = np.empty(size, np.uint8)
    if not self._read(member, row, start, start + size, read):
      return None
    block = start // checksums.BLOCK_BYTES
    if zlib.crc32(read) != sums[row][block]:
      name = self._group.members[member]
      self.damaged.add((name, f'parity {row} block {block}'))
      return None
    return read

  def _losses(self, stripe, known):
    stripes = self._group.stripes
    lost = [
      self._group.members[stripes.holder(stripe, part)]
      for part in range(len(self._group.members))
      if part not in known
    ]
    return (
      f'keepers {", ".join(lost)} are gone or have it damaged, and '
      f'{self._group.num_parity} may'
    )


def _runs(wanted):
  """Neighbouring blocks of one chunk together, `(member, blocks)`."""
  runs: list[tuple[int, list[tuple[int, int]]]] = []
  for member, (chunk, block) in wanted:
    if runs:
      last_member, blocks = runs[-1]
      if (
        last_member == member
        and blocks[-1] == (chunk, block - 1)
        and len(blocks) < _RUN_BLOCKS
      ):
        blocks.append((chunk, block))
        continue
    runs.append((member, [(chunk, block)]))
  return runs


def choose(found: Sequence[Found], step: int | None) -> Found | None:
  """The newest readable version, of `step` if it is not `None`."""
  for f in found:  # Newest first.
    if step in (None, f.id[1]) and f.why_not() is None:
      return f
  return None


def restorable_steps(
  addresses: Sequence[str], timeout_s: float = 60.0
) -> list[int]:
  """Steps that living keepers can restore together, the newest saved last.

  Args:
    addresses: 'host:port' of keepers of which some live.
    timeout_s: For each answer.
  """
  found, _ = find(addresses, timeout_s)
  steps = [f.id[1] for f in reversed(found) if f.why_not() is None]
  # After a run that went back a step may be there twice.
  return [s for i, s in enumerate(steps) if s not in steps[i + 1 :]]


def why_none(
  found: Sequence[Found], silent: Mapping[str, str], step: int | None
) -> str:
  """Words for that `choose` has found nothing."""
  readable = [f.id[1] for f in found if f.why_not() is None]
  wanted = [f for f in found if step in (None, f.id[1])]
  parts = [f'no snapshot{"" if step is None else f" of step {step}"}']
  parts += [f'step {f.id[1]}: {f.why_not()}' for f in wanted]
  parts += silent.values()
  if readable:
    parts.append(f'there is step {" or ".join(map(str, readable))}')
  return '; '.join(parts)
