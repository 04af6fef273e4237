"""Answers that end when their client goes away."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
import contextlib
import json
from typing import Any

_HEADERS = [
  (b'content-type', b'text/event-stream; charset=utf-8'),
  (b'cache-control', b'no-cache'),
  # Proxies must not wait for more.
  (b'x-accel-buffering', b'no'),
]
_ENCODER = json.JSONEncoder(
  ensure_ascii=False, allow_nan=False, separators=(',', ':')
)
Receive = Callable[[], Awaitable[dict[str, Any]]]


class ClientGone(Exception):
  """The client has closed the connection; nobody reads an answer."""


def to_json(value: Any) -> bytes:
  """One line of JSON; half characters, which UTF-8 cannot hold, become '?'."""
  return _ENCODER.encode(value).encode('utf-8', 'replace')


async def until_disconnect(
  receive: Receive, work: Coroutine[Any, Any, Any]
) -> Any:
  """The result of `work`, which is cancelled if the client goes away.

  Args:
    receive: Of ASGI; the body has been read.
    work: What to do.

  Raises:
    ClientGone: It did.
  """
  task = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_disconnect(receive))
  try:
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientGone
    return task.result()
  finally:
    task.cancel()
    gone.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


class EventStream:
  """An answer of server-sent events, as an ASGI application.

  https://html.spec.whatwg.org/multipage/server-sent-events.html

  Args:
    events: Objects to send as JSON; '[DONE]' follows them.
    on_end: Called at the end, whatever happened.
  """

  def __init__(
    self, events: AsyncGenerator[Any, None], on_end: Callable[[], None]
  ):
    self._events = events
    self._on_end = on_end

  async def __call__(self, scope, receive, send):
    try:
      # The client may close a connection in the middle: no error of ours.
      with contextlib.suppress(ClientGone, OSError):
        await until_disconnect(receive, self._send_all(send))
    finally:
      self._on_end()

  async def _send_all(self, send):
    await send(
      {'type': 'http.response.start', 'status': 200, 'headers': _HEADERS}
    )
    async with contextlib.aclosing(self._events):
      async for event in self._events:
        await _send_data(send, to_json(event))
    await _send_data(send, b'[DONE]')
    await send({'type': 'http.response.body', 'body': b''})


async def _send_data(send, data):
  body = b'data: ' + data + b'\n\n'
  await send({'type': 'http.response.body', 'body': body, 'more_body': True})


async def _disconnect(receive):
  while (await receive())['type'] != 'http.disconnect':
    pass
