"""How a trainer hands its bytes to its keeper, or does without it."""

import logging
import os
import time
from typing import Any

import numpy as np

from jaxtrain.checkpoints.in_memory import exchange
from jaxtrain.checkpoints.in_memory import slots
from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.versions import Group
from jaxtrain.checkpoints.in_memory.versions import VersionId

_log = logging.getLogger(__name__)
_MAX_MAPPED = 8
_PATIENCE = 10


class Feed:
  """A trainer's end of one keeper. Not for several threads at a time.

  Args:
    address: 'host:port' of the keeper, on this host.
    timeout_s: For each answer.
  """

  def __init__(self, address: str, timeout_s: float):
    self.address = address
    self._timeout_s = timeout_s
    self._peer: wire.Peer | None = None
    self._mapped: dict[int, np.ndarray] = {}
    self._own = np.zeros(0, np.uint8)  # Without a keeper.
    self._version: tuple[VersionId, Group, int] | None = None
    self._hung_until = 0.0
    self._is_lost = False

  def check(self) -> None:
    """Looks whether the keeper is on this host.

    Raises:
      ValueError: It answers, but from another.
    """
    try:
      self._connect()
    except wire.WireError as local:
      try:
        wire.connect(self.address, self._timeout_s).close()
      except wire.WireError:
        return  # It is not there at all; another may be started.
      raise ValueError(
        f'keeper {self.address} answers, but is not on the host of its process'
      ) from local

  def begin(
    self, version_id: VersionId, group: Group, index: int
  ) -> np.ndarray:
    """Memory to write the bytes to, uint8, with anything in it.

    Args:
      version_id: `(generation, step)`.
      group: Keepers of the version.
      index: Which of them this is.

    Raises:
      RefusedError: The keeper has a later version.
    """
    self._version = version_id, group, index
    message = {
      'op': 'begin',
      'version': version_id,
      'group': group.to_json(),
      'index': index,
    }
    try:
      answer, fds = self._ask(message)
    except wire.RefusedError:
      raise
    except wire.WireError as e:
      self._lose(e)
      size = group.stripes.num_data * group.chunk_bytes
      if self._own.size != size:
        self._own = np.zeros(size, np.uint8)
      return self._own
    (fd,) = fds
    try:
      return self._map(answer['slot'], fd, answer['num_bytes'])
    finally:
      os.close(fd)

  def end(self, header: dict[str, Any], data: np.ndarray) -> dict[str, Any]:
    """Says that the bytes are whole; waits until the version counts.

    Args:
      header: 'num_bytes', 'checksums', and what a reader should know.
      data: What `begin` returned.

    Returns:
      'is_committed', 'absent' (addresses of keepers and why), 'reason'.
    """
    version_id, group, index = self._version
    if self._peer is not None:
      message = {
        'op': 'end',
        'version': version_id,
        'header': header,
        'timeout_s': self._timeout_s,
      }
      try:
        # The keeper itself gives up after `timeout_s`, and then answers.
        return self._peer.ask(message, timeout_s=2 * self._timeout_s)[0]
      except wire.RefusedError:
        raise
      except wire.WireError as e:
        self._lose(e)
    answer = exchange.run_for_trainer(
      version_id, group, index, header, data, self._timeout_s
    )
    answer['absent'][self.address] = 'its trainer does without it'
    return answer

  def close(self) -> None:
    """Closes the connection; the keeper keeps what it has."""
    if self._peer is not None:
      self._peer.close()
    self._peer = None
    self._mapped = {}

  def _ask(self, message):
    """Asks the keeper, or another that was started in its place."""
    if time.monotonic() < self._hung_until:
      raise wire.SlowError(f'keeper {self.address} has not answered')
    if self._peer is not None:
      try:
        return self._peer.ask(message, max_fds=1)
      except (wire.RefusedError, wire.SlowError):
        raise
      except wire.WireError:
        self.close()
    self._connect()
    return self._peer.ask(message, max_fds=1)

  def _connect(self):
    sock = wire.connect_local(self.address, self._timeout_s)
    self._peer = wire.Peer(self.address, sock)
    if self._is_lost:
      _log.warning('Keeper %s is back', self.address)
    self._is_lost = False

  def _lose(self, error):
    if not self._is_lost:
      _log.warning('Snapshots are taken without a keeper: %s', error)
    self._is_lost = True
    if isinstance(error, wire.SlowError):
      # Not to wait for it at every step.
      self._hung_until = time.monotonic() + _PATIENCE * self._timeout_s
    self.close()

  def _map(self, number, fd, num_bytes):
    if number not in self._mapped:
      while len(self._mapped) >= _MAX_MAPPED:
        del self._mapped[next(iter(self._mapped))]
      self._mapped[number] = slots.map_slot(fd, num_bytes)
    return self._mapped[number]
