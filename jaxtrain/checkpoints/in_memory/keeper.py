r"""A process that keeps snapshots in memory while trainers come and go.

python -m jaxtrain.checkpoints.in_memory.keeper --port=7000 --host=10.0.0.4

One per host, or several (the part of a host is then cut among them); the
snapshot management process of "Reliable and Efficient In-Memory Fault Tolerance
of Large Language Model Pretraining", Wang et al.,
https://arxiv.org/abs/2310.12670 (of which only the abstract was at hand). It
imports no jax and knows of no group: who its peers are, it learns with every
snapshot. Its trainer writes into memory that both have mapped; the other
keepers are reached over TCP. It prints one line when it is ready. SIGTERM ends
it, and with it what it holds.

Memory: with n keepers and m rows of parity, (keep + 1) (1 + m / (n - m)) times
the part of the state that is its own.
"""

import argparse
import logging
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np

from jaxtrain.checkpoints.in_memory import exchange
from jaxtrain.checkpoints.in_memory import parity
from jaxtrain.checkpoints.in_memory import wire
from jaxtrain.checkpoints.in_memory.versions import Group
from jaxtrain.checkpoints.in_memory.versions import Versions

_log = logging.getLogger(__name__)
_READY = 'keeper ready at '
_PART_BYTES = 1 << 18  # Received and added at once; stays in the cache.


class Keeper:
  """Serves one port in threads; `close` ends it.

  Args:
    host: Address to listen at.
    port: TCP port; 0 takes any free one.
    keep: Committed versions to keep.

  Attributes:
    address: 'host:port' of what was taken.
    versions: What it holds.
  """

  def __init__(self, host: str = '127.0.0.1', port: int = 0, keep: int = 2):
    self.versions = Versions(keep)
    self.last_message = time.monotonic()
    tcp = socket.create_server((host, port), backlog=128)
    port = tcp.getsockname()[1]
    self.address = f'{host}:{port}'
    local = socket.socket(socket.AF_UNIX)
    local.bind(wire.local_name(port))
    local.listen(128)
    self._listening = [tcp, local]
    self._open: set[socket.socket] = set()
    self._closed = False
    threading.Thread(target=self._accept, daemon=True).start()

  def close(self) -> None:
    """Ends it as if the process had died; the memory goes with it."""
    self._closed = True
    for sock in [*self._listening, *self._open]:
      try:
        sock.shutdown(socket.SHUT_RDWR)
      except OSError:
        pass
      sock.close()
    self.versions.close()

  def _accept(self):
    while not self._closed:
      try:
        ready, _, _ = select.select(self._listening, (), ())
        for listening in ready:
          sock, _ = listening.accept()
          self._open.add(sock)
          threading.Thread(
            target=self._serve, args=(sock,), daemon=True
          ).start()
      except (OSError, ValueError):
        return

  def _serve(self, sock):
    try:
      if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      while True:
        message, _ = wire.receive(sock)
        if message is None:
          return
        self.last_message = time.monotonic()
        try:
          _OPERATIONS[message['op']](self, sock, message)
        except (KeyError, TypeError, ValueError) as e:
          wire.send(sock, {'error': str(e) or repr(e)})
          if message['bytes']:  # Of which some may not have been read.
            return
    except OSError as e:
      if not self._closed:
        _log.info('A connection broke: %s', e)
    finally:
      self._open.discard(sock)
      sock.close()

  def _begin(self, sock, message):
    version = self.versions.begin(
      tuple(message['version']),
      Group.from_json(message['group']),
      message['index'],
    )
    slot = version.slot
    answer = {'slot': slot.number, 'num_bytes': slot.bytes.size}
    wire.send(sock, answer, fds=[slot.fd])

  def _end(self, sock, message):
    with self.versions.reading(tuple(message['version'])) as version:
      header = message['header']
      self.versions.end(version, header)
      answer = exchange.run_for_keeper(
        self.versions, version, header, message['timeout_s']
      )
    wire.send(sock, answer)

  def _contribute(self, sock, message):
    group = Group.from_json(message['group'])
    version = self.versions.contribution(
      tuple(message['version']), group, message['receiver']
    )
    sender = message['sender']
    self.versions.start_receiving(version, sender)
    stripes = group.stripes
    matrix = parity.coefficients(stripes.num_data, stripes.num_parity)
    scratch = np.empty(_PART_BYTES, np.uint8)
    try:
      for chunk, row, num_bytes in message['chunks']:
        factor = int(matrix[row, chunk])
        for start in range(0, num_bytes, _PART_BYTES):
          part = scratch[: min(_PART_BYTES, num_bytes - start)]
          wire.receive_into(sock, memoryview(part))
          self.versions.add(version, row, start, part, factor)
    except OSError:
      self.versions.spoil(version)
      raise
    self.versions.received(version, sender, message['header'])
    wire.send(sock, {})

  def _stand_in(self, sock, message):
    version = self.versions.contribution(
      tuple(message['version']),
      Group.from_json(message['group']),
      message['receiver'],
    )
    has = self.versions.stand_in(version, message['sender'])
    wire.send(sock, {'has_received': has})

  def _prepared(self, sock, message):
    self.versions.note_prepared(tuple(message['version']), message['sender'])
    wire.send(sock, {})

  def _ping(self, sock, message):
    version = self.versions.find(tuple(message['version']))
    answer = {
      'is_known': version is not None,
      'is_committed': version is not None and version.committed,
      'failed': None if version is None else version.why_failed,
    }
    wire.send(sock, answer)

  def _versions(self, sock, message):
    del message
    wire.send(sock, {'versions': self.versions.describe()})

  def _headers(self, sock, message):
    with self.versions.reading(tuple(message['version'])) as version:
      answer = {
        'headers': {str(i): h for i, h in version.headers.items()},
        'row_checksums': version.row_checksums,
      }
    wire.send(sock, answer)

  def _read(self, sock, message):
    """Ranges of its own bytes (part -1) or of a row of parity."""
    with self.versions.reading(tuple(message['version'])) as version:
      part = message['part']
      slot = version.slot if part < 0 else version.rows[part]
      buffers = [memoryview(slot.bytes[a:b]) for a, b in message['ranges']]
      wire.send(sock, {}, buffers)


_OPERATIONS = {
  'begin': Keeper._begin,
  'end': Keeper._end,
  'contribute': Keeper._contribute,
  'stand_in': Keeper._stand_in,
  'prepared': Keeper._prepared,
  'ping': Keeper._ping,
  'versions': Keeper._versions,
  'headers': Keeper._headers,
  'read': Keeper._read,
}


class KeeperProcess:
  """A keeper in a process of its own.

  Args:
    host: Address to listen at.
    port: TCP port; 0 takes any free one.
    keep: Committed versions to keep.
    idle_exit_s: It ends by itself after so long without a message; `None`
      never.

  Attributes:
    address: 'host:port'.
    process: `subprocess.Popen`.

  Raises:
    RuntimeError: It did not start; says why.
  """

  def __init__(
    self,
    host: str = '127.0.0.1',
    port: int = 0,
    keep: int = 2,
    idle_exit_s: float | None = None,
  ):
    flags = [f'--host={host}', f'--port={port}', f'--keep={keep}']
    if idle_exit_s is not None:
      flags.append(f'--idle_exit_s={idle_exit_s}')
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'jaxtrain.checkpoints.in_memory.keeper', *flags],
      stdout=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parents[3],
      # What stops the trainers (Ctrl-C) must not stop it.
      start_new_session=True,
    )
    line = self.process.stdout.readline()
    if not line.startswith(_READY):
      code = self.process.wait()
      raise RuntimeError(
        f'the keeper at {host}:{port} did not start (exit code {code}); its '
        'own words are on stderr'
      )
    self.address = line[len(_READY) :].strip()

  def kill(self) -> None:
    """SIGKILL: what it holds is gone."""
    self.process.kill()
    self.process.wait()
    self.process.stdout.close()


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--host', default='127.0.0.1', help='to listen at')
  parser.add_argument('--port', type=int, default=0, help='0: any')
  parser.add_argument('--keep', type=int, default=2, help='whole versions')
  parser.add_argument(
    '--idle_exit_s', type=float, help='end after so long without a message'
  )
  flags = parser.parse_args()
  logging.basicConfig(format='keeper: %(message)s')
  try:
    keeper = Keeper(flags.host, flags.port, flags.keep)
  except (OSError, ValueError) as e:
    sys.exit(f'keeper: {flags.host}:{flags.port}: {e}')
  print(f'{_READY}{keeper.address}', flush=True)
  stopped = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopped.set())
  while not stopped.wait(1.0):
    idle_s = time.monotonic() - keeper.last_message
    if flags.idle_exit_s is not None and idle_s > flags.idle_exit_s:
      break
  keeper.close()


if __name__ == '__main__':
  main()
