"""`/v1/completions` and `/v1/chat/completions`."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
import json
import re
import time
from typing import Any

from starlette.responses import Response

from jaxserve.chat import ChatTemplate
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.async_engine import EngineStopped
from jaxserve.engine.async_engine import QueueFull
from jaxserve.engine.async_engine import Stream
from jaxserve.engine.outputs import RequestOutput
from jaxserve.engine.request import NO_TOKEN
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.server import tables
from jaxserve.server.answers import ChatAnswer
from jaxserve.server.answers import CompletionAnswer
from jaxserve.server.answers import TokenTexts
from jaxserve.server.errors import ApiError
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.streaming import EventStream
from jaxserve.server.streaming import Receive
from jaxserve.server.streaming import to_json
from jaxserve.server.streaming import until_disconnect
from jaxtrain.checkpoints.tokenizer import Tokenizer

_RETRY_AFTER_S = 1
Values = Mapping[str, Any]


class Generation:
  """Answers requests for text.

  Args:
    engine: Runs them.
    tokenizer: Of the model.
    chat_template: Of the model, if it has one.
    metrics: Where answers are timed.
    model: Name of the model.
  """

  def __init__(
    self,
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    metrics: ServerMetrics,
    model: str,
  ):
    self._engine = engine
    self._tokenizer = tokenizer
    self._texts = TokenTexts(tokenizer)
    self._chat_template = chat_template
    self._metrics = metrics
    self._model = model

  async def complete(self, receive: Receive, values: Values) -> Any:
    """Continues prompts.

    Args:
      receive: Of ASGI, to learn that the client has gone.
      values: The parsed body.

    Returns:
      The answer, an ASGI application.

    Raises:
      ApiError: The request cannot be answered.
      ClientGone: There is nobody to answer.
    """
    max_tokens, logprobs = values['max_tokens'], values['logprobs']
    scores_prompt = values['echo'] and logprobs is not None
    if max_tokens == 0 and not values['echo']:
      raise _wrong('max_tokens', 'max_tokens=0 needs echo')
    if scores_prompt and values['stream']:
      raise _wrong('echo', 'echo with logprobs cannot be streamed')
    params = tables.COMPLETION.sampling_params(
      values,
      # What is not wanted is generated and not returned.
      max_tokens=max(1, max_tokens),
      prompt_logprobs=logprobs if scores_prompt else None,
      json_schema=_json_schema(values['response_format']),
    )
    prompts = await asyncio.to_thread(self._encode, values['prompt'])
    answer = CompletionAnswer(
      self._model, self._tokenizer, self._texts, values, prompts
    )
    return await self._answer(receive, values, prompts, params, answer)

  async def chat(self, receive: Receive, values: Values) -> Any:
    """Answers a conversation; as `complete`."""
    tops = values['top_logprobs']
    if tops is not None and not values['logprobs']:
      raise _wrong('top_logprobs', 'top_logprobs needs logprobs')
    lengths = {values['max_tokens'], values['max_completion_tokens']} - {None}
    if len(lengths) > 1:
      raise _wrong(
        'max_tokens', 'max_tokens and max_completion_tokens are different'
      )
    params = tables.CHAT.sampling_params(
      values,
      max_tokens=lengths.pop() if lengths else None,
      logprobs=(tops or 0) if values['logprobs'] else None,
      json_schema=_json_schema(values['response_format']),
    )
    prompts = [await asyncio.to_thread(self.chat_tokens, values)]
    answer = ChatAnswer(
      self._model, self._tokenizer, self._texts, values, prompts
    )
    return await self._answer(receive, values, prompts, params, answer)

  def chat_tokens(self, values: Values) -> list[int]:
    """Tokens of the conversation in `values`.

    Raises:
      ApiError: 400: There is no chat template, or it refuses the messages.
    """
    if self._chat_template is None:
      raise _wrong(
        'messages',
        f'the model {self._model} has no chat template; start the server with '
        'one, or use /v1/completions',
      )
    try:
      return self._chat_template.token_ids(
        values['messages'],
        add_generation_prompt=values['add_generation_prompt'],
        variables=values['chat_template_kwargs'],
      )
    except ValueError as e:
      raise _wrong('messages', str(e)) from None

  def _encode(self, prompt) -> list[Sequence[int]]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts[0], int):
      return [prompts]
    return [
      self._tokenizer.encode(p, add_bos=True) if isinstance(p, str) else p
      for p in prompts
    ]

  async def _answer(self, receive, values, prompts, params, answer):
    include_usage = False
    if values['stream_options'] is not None:
      if not values['stream']:
        raise _wrong('stream_options', 'stream_options needs stream')
      include_usage = values['stream_options'].get('include_usage', False)
    start_s = time.perf_counter()
    stream = await self._submit(values, prompts, params)
    if values['stream']:
      events = self._events(stream, start_s, answer, params.n, include_usage)
      return EventStream(events, stream.cancel)
    try:
      outputs = await until_disconnect(receive, self._outputs(stream, start_s))
    finally:
      stream.cancel()
    return Response(
      to_json(answer.whole(outputs)), media_type='application/json'
    )

  async def _submit(self, values, prompts, params: SamplingParams) -> Stream:
    try:
      return await self._engine.submit(
        prompts, params, priority=values['priority'], client=values['user']
      )
    except ValueError as e:
      # The engine's own number says nothing to a client.
      message = re.sub(r'^request \d+: ', '', str(e))
      raise ApiError(400, message, code='invalid_request') from None
    except QueueFull as e:
      raise ApiError(
        429,
        str(e),
        code='queue_full',
        headers={'retry-after': str(_RETRY_AFTER_S)},
      ) from None
    except EngineStopped as e:
      raise _stopped(e) from None

  async def _outputs(self, stream, start_s) -> list[RequestOutput]:
    outputs = {}
    try:
      async for delta in self._metrics.observed(stream, start_s):
        if delta.output is not None:
          outputs[delta.request_id] = delta.output
    except EngineStopped as e:
      raise _stopped(e) from None
    for out in outputs.values():
      for c in out.outputs:
        if c.finish_reason not in ('stop', 'length'):
          raise _failed(c.error or c.finish_reason)
    return [outputs[i] for i in stream.request_ids]

  async def _events(
    self, stream, start_s, answer, n, include_usage
  ) -> AsyncGenerator[dict[str, Any], None]:
    outputs = {}
    for chunk in answer.first_chunks():
      yield chunk
    try:
      async for delta in self._metrics.observed(stream, start_s):
        if delta.finish_reason not in (None, 'stop', 'length'):
          error = _error_of(delta)
          yield _failed(error).body()
          return
        at = stream.request_ids.index(delta.request_id) * n + delta.index
        if (chunk := answer.chunk(at, delta)) is not None:
          yield chunk
        if delta.output is not None:
          outputs[delta.request_id] = delta.output
    except EngineStopped as e:
      yield _stopped(e).body()
      return
    if include_usage:
      yield answer.last_chunk([outputs[i] for i in stream.request_ids])


def _json_schema(response_format):
  if response_format is None or response_format['type'] == 'text':
    return None
  if response_format['type'] == 'json_object':
    return json.dumps({'type': 'object'})
  return json.dumps(response_format['json_schema']['schema'])


def _error_of(delta):
  completion = delta.output and delta.output.outputs[delta.index]
  return (completion and completion.error) or delta.finish_reason


def _failed(error):
  if error == NO_TOKEN:  # Known only as tokens come; the caller's all the same.
    return ApiError(400, error, code='conflicting_constraints')
  return ApiError(500, error, code='engine_error')


def _stopped(error):
  return ApiError(503, str(error), code='engine_stopped')


def _wrong(param, message):
  return ApiError(400, message, param=param, code='invalid_request')
