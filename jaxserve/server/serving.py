"""Runs the application on a socket, until a signal ends it gracefully."""

import asyncio
from collections.abc import Callable
import socket
import time

from starlette.applications import Starlette
import uvicorn

from jaxserve.engine.async_engine import AsyncEngine

# What the engine has finished is at least so long on its way to clients.
_LAST_BYTES_S = 1.0


def listening_socket(host: str, port: int) -> socket.socket:
  """A socket bound to an address; port 0 is any free one.

  Raises:
    OSError: The address does not exist here or is in use.
  """
  family, _, _, _, address = socket.getaddrinfo(
    host, port, type=socket.SOCK_STREAM
  )[0]
  bound = socket.socket(family, socket.SOCK_STREAM)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind(address)
  except OSError:
    bound.close()
    raise
  return bound


class Server(uvicorn.Server):
  """A server that drains: it finishes what runs and refuses what is new.

  The first SIGTERM or SIGINT starts that, the second ends it at once.

  Args:
    app: The application.
    engine: Runs its requests.
    bound: Where to listen.
    drain_timeout_s: What is not finished this long after the signal is cut off.
    on_ready: Called with the address when requests are taken.

  Attributes:
    url: The address.
    was_drained: Whether all that ran could be finished.
  """

  def __init__(
    self,
    app: Starlette,
    engine: AsyncEngine,
    bound: socket.socket,
    *,
    drain_timeout_s: float = 30.0,
    on_ready: Callable[[str], None] = lambda url: None,
  ):
    super().__init__(
      uvicorn.Config(
        app,
        log_level='warning',
        access_log=False,
        lifespan='off',
        timeout_graceful_shutdown=_LAST_BYTES_S,
      )
    )
    self._engine = engine
    self._drain_timeout_s = drain_timeout_s
    self._on_ready = on_ready
    self._draining: asyncio.Task | None = None
    self._loop: asyncio.AbstractEventLoop | None = None
    self._socket = bound
    host, port = bound.getsockname()[:2]
    self.url = (
      f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'
    )
    self.was_drained = True

  def serve_forever(self) -> None:
    """Serves until a signal, or `stop`."""
    self.run(sockets=[self._socket])

  def stop(self) -> None:
    """Starts to drain, once it serves; from any thread."""
    self._loop.call_soon_threadsafe(self._start_to_drain)

  async def startup(self, sockets=None) -> None:
    """Of uvicorn: also says that it is ready."""
    await super().startup(sockets=sockets)
    self._loop = asyncio.get_running_loop()
    self._on_ready(self.url)

  def handle_exit(self, sig: int, frame: object) -> None:
    """Of uvicorn: what signals do; unlike there, the process ends with 0."""
    del sig, frame
    if self._loop is None:
      self.should_exit = True
    elif self._draining is None:
      self._loop.call_soon_threadsafe(self._start_to_drain)
    else:
      self.should_exit = self.force_exit = True

  def _start_to_drain(self):
    if self._draining is None:
      self._draining = self._loop.create_task(self._drain())

  async def _drain(self):
    deadline = time.monotonic() + self._drain_timeout_s
    try:
      self.was_drained = await self._engine.drain(self._drain_timeout_s)
      if not self.was_drained:
        # Tells the clients that wait.
        await asyncio.to_thread(self._engine.close)
    finally:
      self.config.timeout_graceful_shutdown = max(
        _LAST_BYTES_S, deadline - time.monotonic()
      )
      self.should_exit = True
