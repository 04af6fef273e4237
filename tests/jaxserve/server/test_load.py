"""Many clients at once, many of whom leave."""

import asyncio
import json
import random
import urllib.parse

import pytest

_MAX_TOKENS = 6


async def _request(address, key, i, leave_after):
  """Reads a stream; closes the connection after so many events, if asked."""
  body = json.dumps(
    {
      'model': 'tiny',
      'prompt': [i % 250, 7, i // 250],
      'max_tokens': _MAX_TOKENS,
      'temperature': 0,
      'stream': True,
      'return_token_ids': True,
    }
  )
  reader, writer = await asyncio.open_connection(*address)
  try:
    writer.write(
      f'POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n'
      f'authorization: Bearer {key}\r\ncontent-type: application/json\r\n'
      f'content-length: {len(body)}\r\n\r\n{body}'.encode()
    )
    if leave_after == 0:
      return None
    tokens, num_events = [], 0
    async for line in reader:
      if line.startswith(b'data: {'):
        num_events += 1
        [choice] = json.loads(line[6:])['choices']
        tokens += choice['token_ids']
        if num_events == leave_after:
          return None
      elif line.startswith(b'data: [DONE]'):
        return tuple(tokens)
    raise AssertionError('the stream was cut')
  finally:
    writer.close()


@pytest.mark.parametrize(
  'num_requests', [200, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_many_streams_with_random_disconnects(
  server, engine, llm, tiny, key, num_requests
):
  rng = random.Random(0)
  leaves = [
    rng.randrange(_MAX_TOKENS - 1) if rng.random() < 0.5 else None
    for _ in range(num_requests)
  ]
  engine.max_unfinished = num_requests
  address = urllib.parse.urlsplit(server.url)

  async def main():
    results = await asyncio.gather(
      *(
        _request((address.hostname, address.port), key, i, leave)
        for i, leave in enumerate(leaves)
      )
    )
    while engine.num_unfinished:
      await asyncio.sleep(0.01)
    return results

  results = asyncio.run(main())
  for i in range(0, num_requests, 40):
    if leaves[i] is None:
      expected = tiny.greedy([i % 250, 7, i // 250], _MAX_TOKENS)
      assert results[i] == expected
  assert [r is None for r in results] == [x is not None for x in leaves]
  assert llm.engine.num_held_pages == llm.engine.num_unfinished == 0
