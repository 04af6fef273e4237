"""An engine for many coroutines: one thread owns it and runs its steps.

What coroutines want of the engine is queued and done between two steps; what a
step adds is sent to their event loops in one call per loop. With nothing to do
the thread sleeps.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import concurrent.futures
import contextlib
import functools
import threading
from typing import Any

from jaxserve.engine.outputs import Delta
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.sampling_params import SamplingParams

Prompt = str | Sequence[int]


class QueueFull(RuntimeError):
  """As many requests are unfinished as may be; try again later."""


class EngineStopped(RuntimeError):
  """The engine takes no requests any more, or gave one up."""


class Stream:
  """What the requests of one `AsyncEngine.submit` get, as it comes.

  Iterate it once; it ends with the last delta of the last request, and raises
  `EngineStopped` if the engine ends before.

  Attributes:
    request_ids: Numbers of the requests, one per prompt.
  """

  def __init__(self, owner: 'AsyncEngine', num_requests: int, weight: int):
    self.request_ids: tuple[int, ...] = ()
    self.weight = weight  # Continuations.
    self.num_running = num_requests  # The engine thread's own count.
    self.loop = asyncio.get_running_loop()
    self.admitted = self.loop.create_future()
    self._owner = owner
    self._num_left = num_requests
    self._arrived = asyncio.Queue()

  def __aiter__(self) -> 'Stream':
    return self

  async def __anext__(self) -> Delta:
    if not self._num_left:
      raise StopAsyncIteration
    item = await self._arrived.get()
    if isinstance(item, Exception):
      self._num_left = 0
      raise item
    self._num_left -= item.output is not None
    return item

  def cancel(self) -> None:
    """Ends what is unfinished, and frees its pages; may be called again."""
    self._num_left = 0
    self._owner.forget(self)

  def hand_out(self, item: Delta | Exception | None) -> None:
    """Takes a delta, an error, or `None`: admitted. In the loop's thread."""
    if self.admitted.done():
      self._arrived.put_nowait(item)
    elif isinstance(item, Exception):
      self.admitted.set_exception(item)
    else:
      self.admitted.set_result(None)


class AsyncEngine:
  """Runs an engine in a thread of its own.

  >>> async with AsyncEngine(llm) as engine:
  ...   async for delta in engine.stream('To be, or', SamplingParams()):
  ...     print(delta.text, end='')

  Nobody else may use the engine meanwhile. Methods may be called from several
  event loops.

  Args:
    engine: An `Engine`, or an `LLM`, whose engine it is.
    max_unfinished: Continuations that run or wait at once; more are refused.
  """

  def __init__(self, engine: Any, *, max_unfinished: int = 1024):
    if max_unfinished < 1:
      raise ValueError(f'max_unfinished={max_unfinished} must be at least 1')
    self.max_unfinished = max_unfinished
    self.failure: BaseException | None = None
    self._engine = getattr(engine, 'engine', engine)
    lock = threading.Lock()
    self._wake = threading.Condition(lock)
    self._idle = threading.Condition(lock)
    # Under the lock: what to do next (and who waits for its result), who is
    # served, and their continuations.
    self._commands: list[tuple[Callable, concurrent.futures.Future | None]] = []
    self._streams: set[Stream] = set()
    self._num_unfinished = 0
    self._refusal: str | None = None
    self._is_closing = self._has_ended = False
    # Of the engine's thread.
    self._outbox: list[tuple[Stream, Delta | Exception | None]] = []
    self._thread = threading.Thread(
      target=self._work, name='engine', daemon=True
    )
    self._thread.start()

  @property
  def metrics(self) -> Any:
    """Those of the engine; read them, and expect them to move."""
    return self._engine.metrics

  @property
  def num_unfinished(self) -> int:
    """Continuations that run or wait."""
    return self._num_unfinished

  @property
  def num_held_pages(self) -> int:
    """Pages that requests hold."""
    return self._engine.num_held_pages

  @property
  def is_accepting(self) -> bool:
    """Whether requests are taken: not draining, closed or failed."""
    return self._refusal is None

  async def stream(
    self,
    prompt: Prompt,
    params: SamplingParams = SamplingParams(),
    *,
    priority: int = 0,
    client: str = '',
  ) -> AsyncIterator[Delta]:
    """Yields what each step adds to the continuations of a prompt.

    Leaving the loop early ends the request and frees its pages.

    Raises:
      ValueError: As from `Engine.add_request`.
      QueueFull: Too many requests are unfinished.
      EngineStopped: The engine is draining or closed, or has failed.
    """
    stream = await self.submit(
      [prompt], params, priority=priority, client=client
    )
    try:
      async for delta in stream:
        yield delta
    finally:
      stream.cancel()

  async def generate(
    self,
    prompt: Prompt,
    params: SamplingParams = SamplingParams(),
    *,
    priority: int = 0,
    client: str = '',
  ) -> RequestOutput:
    """Continues a prompt; cancelling ends the request. Raises as `stream`."""
    deltas = self.stream(prompt, params, priority=priority, client=client)
    async with contextlib.aclosing(deltas):
      async for delta in deltas:
        output = delta.output
    return output

  async def submit(
    self,
    prompts: Sequence[Prompt],
    params: SamplingParams = SamplingParams(),
    *,
    priority: int = 0,
    client: str = '',
  ) -> Stream:
    """Queues prompts, all or none; call `cancel` when done with the stream.

    Raises:
      ValueError: No prompt, more than `max_unfinished`, or as from
        `Engine.add_request`.
      QueueFull: Too many requests are unfinished.
      EngineStopped: The engine is draining or closed, or has failed.
    """
    weight = len(prompts) * params.n
    if not 1 <= weight <= self.max_unfinished:
      raise ValueError(
        f'{len(prompts)} prompts with n={params.n} ask for {weight} '
        f'continuations; 1 to {self.max_unfinished} are allowed'
      )
    stream = Stream(self, len(prompts), weight)
    admit = functools.partial(
      self._admit, stream, prompts, params, priority, client
    )
    with self._wake:
      if self._refusal is not None:
        raise EngineStopped(self._refusal)
      if self._num_unfinished + weight > self.max_unfinished:
        raise QueueFull(
          f'{self._num_unfinished} continuations are unfinished, and at most '
          f'{self.max_unfinished} may be'
        )
      self._num_unfinished += weight
      self._streams.add(stream)
      self._commands.append((admit, None))
      self._wake.notify()
    try:
      await stream.admitted
    except BaseException:
      stream.cancel()
      raise
    return stream

  async def call(self, function: Callable[[Any], Any]) -> Any:
    """Returns `function(engine)`, run between two steps.

    >>> await engine.call(lambda e: e.update_params(params))
    """
    future = concurrent.futures.Future()

    def run():
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(function(self._engine))
        except Exception as e:
          future.set_exception(e)

    with self._wake:
      if self._has_ended:
        raise EngineStopped(self._refusal)
      self._commands.append((run, future))
      self._wake.notify()
    return await asyncio.wrap_future(future)

  def refuse(self, reason: str) -> None:
    """Takes no requests from now on; those it has go on."""
    with self._wake:
      self._refusal = self._refusal or reason

  async def drain(self, timeout_s: float) -> bool:
    """Takes no more requests, and waits for those it has.

    Returns:
      Whether all were finished in time.
    """
    self.refuse('the server is shutting down')
    is_idle = lambda: not self._streams

    def wait():
      with self._idle:
        return self._idle.wait_for(is_idle, timeout_s)

    return await asyncio.to_thread(wait)

  def close(self) -> None:
    """Ends all requests, after the step that runs, and the thread.

    The engine is left without requests, and may be used again.
    """
    self.refuse('the engine is closed')
    with self._wake:
      self._is_closing = True
      self._wake.notify()
    self._thread.join()

  def forget(self, stream: Stream) -> None:
    """Ends the requests of a stream; unknown and finished ones are ignored."""
    with self._wake:
      if stream in self._streams:
        self._commands.append((functools.partial(self._forget, stream), None))
        self._wake.notify()

  async def __aenter__(self):
    return self

  async def __aexit__(self, *_):
    await asyncio.to_thread(self.close)

  # What follows runs in the engine's thread.

  def _work(self):
    try:
      while self._run_commands():
        if self._engine.num_unfinished:
          self._engine.step()
        self._deliver()
    except BaseException as e:
      self.failure = e
      self.refuse(f'the engine failed: {type(e).__name__}: {e}')
    self._end()

  def _run_commands(self):
    with self._wake:
      self._wake.wait_for(
        lambda: (
          self._commands or self._is_closing or self._engine.num_unfinished
        )
      )
      if self._is_closing:
        return False
      commands, self._commands = self._commands, []
    for run, _ in commands:
      run()
    return True

  def _admit(self, stream, prompts, params, priority, client):
    ids = []
    sink = lambda delta: self._outbox.append((stream, delta))
    try:
      for prompt in prompts:
        ids.append(
          self._engine.add_request(
            prompt, params, priority=priority, client=client, sink=sink
          )
        )
    except Exception as e:
      self._engine.forget(ids)
      self._release(stream)
      self._outbox.append((stream, e))
      return
    stream.request_ids = tuple(ids)
    self._outbox.append((stream, None))

  def _forget(self, stream):
    self._engine.forget(stream.request_ids)
    self._release(stream)

  def _release(self, stream):
    with self._wake:
      if stream in self._streams:
        self._streams.remove(stream)
        self._num_unfinished -= stream.weight
        self._idle.notify_all()

  def _deliver(self):
    outbox, self._outbox = self._outbox, []
    by_loop = {}
    for stream, item in outbox:
      by_loop.setdefault(stream.loop, []).append((stream, item))
      if isinstance(item, Delta) and item.output is not None:
        stream.num_running -= 1
        if not stream.num_running:
          self._release(stream)
    for loop, items in by_loop.items():
      try:
        loop.call_soon_threadsafe(_hand_out, items)
      except RuntimeError:  # The loop is closed: nobody waits any more.
        for stream, _ in items:
          self._forget(stream)

  def _end(self):
    """Tells everybody who waits why nothing more will come."""
    with self._wake:
      self._has_ended = True
      streams, commands = list(self._streams), self._commands
      self._commands = []
    error = EngineStopped(self._refusal)
    error.__cause__ = self.failure
    for _, future in commands:
      if future is not None and future.set_running_or_notify_cancel():
        future.set_exception(error)
    for stream in streams:
      with contextlib.suppress(Exception):
        self._engine.forget(stream.request_ids)
      self._outbox.append((stream, error))
      self._release(stream)
    self._deliver()


def _hand_out(items):
  for stream, item in items:
    stream.hand_out(item)
