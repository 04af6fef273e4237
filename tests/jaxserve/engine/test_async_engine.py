"""Many coroutines, one engine: what they get, and what they leave behind."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import pytest

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.async_engine import EngineStopped
from jaxserve.engine.async_engine import QueueFull
from jaxserve.engine.sampling_params import SamplingParams
from jaxtrain.checkpoints.tokenizer import ByteTokenizer

_GREEDY = SamplingParams(max_tokens=10, temperature=0)
_LONG = dataclasses.replace(_GREEDY, max_tokens=80)
_PROMPTS = [list(b'one'), list(b'and another'), list(b'three') * 3]


@pytest.fixture
def engine(tiny, small_engine, small_runner):
  return tiny.engine(small_runner, small_engine, tokenizer=ByteTokenizer())


@contextlib.asynccontextmanager
async def _running(engine, **kwargs):
  async with AsyncEngine(engine, **kwargs) as running:
    yield running
  assert engine.num_unfinished == engine.num_held_pages == 0


async def _all_pages_free(running, engine):
  """Waits until cancelled requests are gone, between two steps."""
  await running.call(lambda e: None)
  assert engine.num_held_pages == 0 and running.num_unfinished == 0


def test_streams_are_the_outputs(engine, tiny):
  async def read(running, prompt):
    text, tokens = '', ()
    async for delta in running.stream(prompt, _GREEDY):
      text, tokens = text + delta.text, tokens + delta.token_ids
    assert delta.finish_reason == 'length'
    assert (delta.output.text, delta.output.outputs[0].token_ids) == (
      text,
      tokens,
    )
    return tokens

  async def main():
    async with _running(engine) as running:
      return await asyncio.gather(*(read(running, p) for p in _PROMPTS))

  assert asyncio.run(main()) == [tiny.greedy(p, 10) for p in _PROMPTS]


def test_continuations_and_several_prompts_in_one_stream(engine, tiny):
  # Some of them end in the same step.
  params = dataclasses.replace(_GREEDY, n=3)

  async def main():
    async with _running(engine) as running:
      stream = await running.submit(_PROMPTS, params)
      tokens = {}
      async for delta in stream:
        key = (stream.request_ids.index(delta.request_id), delta.index)
        tokens[key] = tokens.get(key, ()) + delta.token_ids
      return tokens

  expected = {
    (i, j): tiny.greedy(p, 10) for i, p in enumerate(_PROMPTS) for j in range(3)
  }
  assert asyncio.run(main()) == expected


def test_leaving_a_stream_frees_its_pages_and_no_others(engine, tiny):
  async def leave_early(running):
    deltas = running.stream(_PROMPTS[0], _LONG)
    async for delta in deltas:
      if delta.token_ids:
        break
    await deltas.aclose()

  async def cancel(running):
    task = asyncio.ensure_future(running.generate(_PROMPTS[1], _LONG))
    while not engine.metrics.num_generated:
      await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task

  async def main():
    async with _running(engine) as running:
      output, *_ = await asyncio.gather(
        running.generate(_PROMPTS[2], _GREEDY),
        leave_early(running),
        cancel(running),
      )
      await _all_pages_free(running, engine)
      return output

  output = asyncio.run(main())
  assert output.outputs[0].token_ids == tiny.greedy(_PROMPTS[2], 10)
  assert engine.metrics.num_generated < 10 + 2 * 80


def test_cancelled_before_it_is_admitted(engine):
  async def main():
    async with _running(engine) as running:
      task = asyncio.ensure_future(running.submit(_PROMPTS, _LONG))
      await asyncio.sleep(0)  # It has been queued, and not more.
      task.cancel()
      with pytest.raises(asyncio.CancelledError):
        await task
      await _all_pages_free(running, engine)

  asyncio.run(main())


def test_what_is_wrong_reaches_the_caller_and_nobody_else(engine, tiny):
  async def main():
    async with _running(engine) as running:
      good = asyncio.ensure_future(running.generate(_PROMPTS[0], _GREEDY))
      with pytest.raises(ValueError, match='not in 0..263'):
        await running.generate([5, 264], _GREEDY)
      with pytest.raises(ValueError, match='prompt is empty'):
        async for _ in running.stream('', _GREEDY):
          pass
      # All or none.
      with pytest.raises(ValueError, match='not in 0..263'):
        await running.submit([_PROMPTS[1], [264]], _LONG)
      output = await good
      await _all_pages_free(running, engine)
      return output

  output = asyncio.run(main())
  assert output.outputs[0].token_ids == tiny.greedy(_PROMPTS[0], 10)
  assert engine.metrics.num_generated == 10


def test_queue_limit(engine):
  async def main():
    async with _running(engine, max_unfinished=3) as running:
      one = await running.submit(_PROMPTS[:1], _LONG)
      with pytest.raises(QueueFull, match='1 continuations are unfinished'):
        await running.submit(_PROMPTS, _GREEDY)
      # More than ever fits is no matter of waiting.
      with pytest.raises(ValueError, match='n=4 ask for 4 continuations'):
        await running.generate(_PROMPTS[0], dataclasses.replace(_GREEDY, n=4))
      two = await running.submit(_PROMPTS[:2], _LONG)
      with pytest.raises(QueueFull):
        await running.generate(_PROMPTS[0], _GREEDY)
      two.cancel()
      await running.call(lambda e: None)
      await running.generate(_PROMPTS[0], _GREEDY)
      one.cancel()

  asyncio.run(main())
  with pytest.raises(ValueError, match='max_unfinished=0'):
    AsyncEngine(engine, max_unfinished=0)


class _Broken:
  """An engine whose steps fail from the second on."""

  def __init__(self, engine):
    self._engine = engine
    self._num_steps = 0

  def __getattr__(self, name):
    return getattr(self._engine, name)

  def step(self):
    self._num_steps += 1
    if self._num_steps > 1:
      raise ZeroDivisionError('by the scheduler')
    return self._engine.step()


def test_a_failure_reaches_every_waiter(engine):
  async def main():
    async with _running(_Broken(engine)) as running:
      results = await asyncio.gather(
        *(running.generate(p, _LONG) for p in _PROMPTS), return_exceptions=True
      )
      for error in results:
        assert isinstance(error, EngineStopped)
        assert str(error) == (
          'the engine failed: ZeroDivisionError: by the scheduler'
        )
      assert isinstance(results[0].__cause__, ZeroDivisionError)
      assert isinstance(running.failure, ZeroDivisionError)
      assert not running.is_accepting
      for call in (
        running.generate(_PROMPTS[0], _GREEDY),
        running.call(lambda e: None),
      ):
        with pytest.raises(EngineStopped, match='by the scheduler'):
          await call

  asyncio.run(main())


def test_draining_finishes_what_runs_and_refuses_what_is_new(engine, tiny):
  async def main():
    async with _running(engine) as running:
      stream = await running.submit(_PROMPTS[:1], _GREEDY)
      draining = asyncio.ensure_future(running.drain(60))
      await asyncio.sleep(0)
      with pytest.raises(EngineStopped, match='shutting down'):
        await running.generate(_PROMPTS[1], _GREEDY)
      *_, last = [delta async for delta in stream]
      assert await draining
      return last.output

  output = asyncio.run(main())
  assert output.outputs[0].token_ids == tiny.greedy(_PROMPTS[0], 10)


class _Slow(_Broken):
  """An engine that never ends anything."""

  def step(self):
    time.sleep(0.01)
    return []


def test_draining_ends_after_its_time_and_closing_tells_who_waits(engine):
  async def main():
    running = AsyncEngine(_Slow(engine))
    tasks = [
      asyncio.ensure_future(running.generate(p, _LONG)) for p in _PROMPTS
    ]
    while running.num_unfinished < 3:
      await asyncio.sleep(0.001)
    assert not await running.drain(0.05)
    await asyncio.to_thread(running.close)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(e, EngineStopped) for e in results), results
    with pytest.raises(EngineStopped):
      await running.call(lambda e: None)

  asyncio.run(main())
  assert engine.num_unfinished == 0


def test_closing_leaves_an_engine_that_can_be_used(engine, tiny):
  async def main():
    async with _running(engine) as running:
      await running.submit(_PROMPTS, _LONG)

  asyncio.run(main())
  engine.add_request(_PROMPTS[0], _GREEDY)
  done = []
  while engine.num_unfinished:
    done += engine.step()
  assert done[0].outputs[0].token_ids == tiny.greedy(_PROMPTS[0], 10)


def test_calls_run_between_steps_in_the_thread_of_the_engine(engine):
  async def main():
    async with _running(engine) as running:
      name = lambda e: (e is engine, threading.current_thread().name)
      assert await running.call(name) == (True, 'engine')
      with pytest.raises(ZeroDivisionError):
        await running.call(lambda e: 1 / 0)
      assert running.is_accepting and running.failure is None

  asyncio.run(main())


def test_an_idle_engine_sleeps(engine):
  async def main():
    async with _running(engine) as running:
      await running.generate(_PROMPTS[0], _GREEDY)
      clock = await running.call(
        lambda e: time.pthread_getcpuclockid(threading.get_ident())
      )
      await asyncio.sleep(0.05)
      before = time.clock_gettime(clock)
      await asyncio.sleep(0.5)
      return time.clock_gettime(clock) - before

  assert asyncio.run(main()) < 0.01


def test_event_loops_of_several_threads(engine, tiny):
  running = AsyncEngine(engine)
  results = {}

  def use(i):
    output = asyncio.run(running.generate(_PROMPTS[i], _GREEDY))
    results[i] = output.outputs[0].token_ids

  async def abandon():
    # Its loop ends before the answer comes.
    await running.submit(_PROMPTS[:1], _LONG)

  asyncio.run(abandon())
  threads = [threading.Thread(target=use, args=(i,)) for i in range(3)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert results == {i: tiny.greedy(p, 10) for i, p in enumerate(_PROMPTS)}

  async def check():
    await _all_pages_free(running, engine)

  asyncio.run(check())
  running.close()
