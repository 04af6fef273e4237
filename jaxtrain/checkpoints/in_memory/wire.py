"""Messages between trainers and keepers: a header in JSON, then raw bytes.

A frame is four bytes of length, the header, and as many bytes as the header's
'bytes' says. Nothing is ever unpickled, but nobody is asked who they are
either: keepers belong on the network of a cluster.
"""

from collections.abc import Sequence
import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct('<I')
_MAX_HEADER = 1 << 28
_SENT_AT_ONCE = 1 << 26
_CONNECT_S = 5.0  # A host without power does not even refuse.


class WireError(ConnectionError):
  """The other side is gone, does not answer in time, or says what is wrong."""


class RefusedError(WireError):
  """The other side is there, and does not do what it is asked."""


class SlowError(WireError):
  """The other side does not answer in time."""


def parse_address(address: str) -> tuple[str, int]:
  """`'host:port'` as host and port.

  Raises:
    ValueError: It is not of that form.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f'keeper {address!r} is not of the form host:port')
  return host, int(port)


def local_name(port: int) -> str:
  """Abstract Unix address of the keeper at `port`, for trainers of its host."""
  return f'\0onemesh-keeper-{port}'


def connect(address: str, timeout_s: float) -> socket.socket:
  """Connects to a keeper over TCP.

  Args:
    address: 'host:port'.
    timeout_s: For every step of a message, and at most 5 s to connect.

  Raises:
    WireError: Nobody is there.
  """
  try:
    sock = socket.create_connection(
      parse_address(address), min(timeout_s, _CONNECT_S)
    )
  except TimeoutError as e:
    raise SlowError(f'keeper {address} does not answer') from e
  except OSError as e:
    raise WireError(f'no keeper at {address} ({e})') from e
  sock.settimeout(timeout_s)
  sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return sock


def connect_local(address: str, timeout_s: float) -> socket.socket:
  """Connects to a keeper of this host, which can then share memory.

  Raises:
    WireError: Nobody is there.
  """
  sock = socket.socket(socket.AF_UNIX)
  sock.settimeout(timeout_s)
  try:
    sock.connect(local_name(parse_address(address)[1]))
  except OSError as e:
    sock.close()
    raise WireError(f'no keeper at {address} on this host ({e})') from e
  return sock


def send(
  sock: socket.socket,
  header: dict[str, Any],
  buffers: Sequence[memoryview] = (),
  fds: Sequence[int] = (),
) -> None:
  """Sends one message.

  Args:
    sock: Connected.
    header: JSON types.
    buffers: The raw bytes behind it.
    fds: Open files to go along, over a Unix socket.
  """
  num_bytes = sum(len(b) for b in buffers)
  text = json.dumps({**header, 'bytes': num_bytes}).encode()
  frame = _LENGTH.pack(len(text)) + text
  if fds:
    frame = frame[socket.send_fds(sock, [frame], list(fds)) :]
  sock.sendall(frame)
  for buffer in buffers:
    # The time limit of a socket is that of one call.
    for start in range(0, len(buffer), _SENT_AT_ONCE):
      sock.sendall(buffer[start : start + _SENT_AT_ONCE])


def receive(
  sock: socket.socket, max_fds: int = 0
) -> tuple[dict[str, Any] | None, list[int]]:
  """Receives a header; its bytes are left for `receive_into`.

  Returns:
    The header (`None` if the other side has closed), and files that came along.
  """
  fds: list[int] = []
  if max_fds:
    start, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, max_fds)
  else:
    start = sock.recv(_LENGTH.size)
  if not start:
    return None, fds
  start = bytearray(start)
  while len(start) < _LENGTH.size:
    start += _some(sock, _LENGTH.size - len(start))
  (length,) = _LENGTH.unpack(start)
  if length > _MAX_HEADER:
    raise WireError(f'a header of {length} bytes: not a message of ours')
  text = bytearray(length)
  receive_into(sock, memoryview(text))
  return json.loads(bytes(text)), fds


def receive_into(sock: socket.socket, buffer: memoryview) -> None:
  """Fills `buffer`.

  Raises:
    WireError: The other side closed before.
  """
  done = 0
  while done < len(buffer):
    count = sock.recv_into(buffer[done:], 0, socket.MSG_WAITALL)
    if not count:
      raise WireError('the connection was closed in the middle of a message')
    done += count


def _some(sock, count):
  part = sock.recv(count)
  if not part:
    raise WireError('the connection was closed in the middle of a message')
  return part


class Peer:
  """A connection that asks and waits for the answer."""

  def __init__(self, address: str, sock: socket.socket):
    self.address = address
    self._sock = sock

  def ask(
    self,
    header: dict[str, Any],
    buffers: Sequence[memoryview] = (),
    into: memoryview | None = None,
    max_fds: int = 0,
    timeout_s: float | None = None,
  ) -> tuple[dict[str, Any], list[int]]:
    """Sends a message and receives the answer.

    Args:
      header: JSON types, with 'op'.
      buffers: Bytes to go with it.
      into: Where the bytes of the answer go, exactly as many.
      max_fds: How many open files may come back.
      timeout_s: Instead of the connection's, from now on.

    Returns:
      The header of the answer, and the files.

    Raises:
      WireError: The keeper is gone.
      SlowError: It does not answer in time.
      RefusedError: It says what is wrong.
    """
    if timeout_s is not None:
      self._sock.settimeout(timeout_s)
    try:
      send(self._sock, header, buffers)
      answer, fds = receive(self._sock, max_fds)
      if answer is None:
        raise WireError('it closed the connection')
      if 'error' in answer:
        raise RefusedError(f'keeper {self.address}: {answer["error"]}')
      if answer['bytes'] != (0 if into is None else len(into)):
        raise WireError(f'it sent {answer["bytes"]} bytes')
      if into is not None:
        receive_into(self._sock, into)
    except RefusedError:
      raise
    except TimeoutError as e:
      raise SlowError(f'keeper {self.address} does not answer') from e
    except (OSError, ValueError) as e:
      raise WireError(f'keeper {self.address}: {e or type(e).__name__}') from e
    return answer, fds

  def close(self) -> None:
    """Closes the connection."""
    self._sock.close()
