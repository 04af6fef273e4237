"""The HTTP server as an ASGI application.

Paths, bodies and errors are those of
https://platform.openai.com/docs/api-reference and, where OpenAI has none, of
vLLM: clients of either need no change.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import hmac
import json
import math
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.llm import LLM
from jaxserve.server import tables
from jaxserve.server.errors import ApiError
from jaxserve.server.generation import Generation
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.openapi import describe
from jaxserve.server.parameters import Body
from jaxserve.server.streaming import ClientGone
from jaxserve.server.streaming import to_json

# Of nginx: nobody reads it.
_CLIENT_GONE = 499


def make_app(
  llm: LLM,
  engine: AsyncEngine,
  *,
  model: str,
  api_keys: Sequence[str] = (),
  max_body_bytes: int = 4 << 20,
) -> Starlette:
  """Makes the application.

  Args:
    llm: The model.
    engine: Runs `llm.engine`; the caller closes it.
    model: Name that clients know the model by.
    api_keys: Any of them is a bearer token that lets in; none are needed if
      there are none.
    max_body_bytes: Longer bodies are refused.

  Raises:
    ValueError: The model has no tokenizer.
  """
  if llm.tokenizer is None:
    raise ValueError('a server needs a tokenizer')
  return _Server(llm, engine, model, api_keys, max_body_bytes).app()


class _Server:
  def __init__(self, llm, engine, model, api_keys, max_body_bytes):
    self._engine = engine
    self._tokenizer = llm.tokenizer
    self._model = model
    self._keys = [k.encode() for k in api_keys]
    self._max_body_bytes = max_body_bytes
    self._metrics = ServerMetrics(engine, llm.runner)
    self._generation = Generation(
      engine, llm.tokenizer, llm.chat_template, self._metrics, model
    )
    self._card = {
      'id': model,
      'object': 'model',
      'created': int(time.time()),
      'owned_by': 'onemesh',
      'max_model_len': llm.runner.sizes.max_seq_len,
    }

  def app(self):
    complete, chat = self._generation.complete, self._generation.chat
    return Starlette(
      routes=[
        self._post('/v1/completions', tables.COMPLETION, complete),
        self._post('/v1/chat/completions', tables.CHAT, chat),
        self._post('/tokenize', tables.TOKENIZE, self._tokenize),
        self._post('/detokenize', tables.DETOKENIZE, self._detokenize),
        self._get('/v1/models', self._list_models),
        self._get('/v1/models/{model:path}', self._show_model),
        self._get('/openapi.json', self._openapi),
        self._get('/health', self._health, is_open=True),
        self._get('/ready', self._ready, is_open=True),
        self._get('/metrics', self._show_metrics, is_open=True),
      ],
      exception_handlers=dict.fromkeys(
        (ApiError, HTTPException, ClientDisconnect, ClientGone, Exception),
        _on_error,
      ),
    )

  def _get(self, path, answer, is_open=False):
    async def respond(request):
      if not is_open:
        self._check_key(request)
      return await answer(request)

    return Route(path, self._counted(path, respond), methods=['GET'])

  def _post(
    self, path: str, body: Body, answer: Callable[..., Awaitable[Any]]
  ) -> Route:
    async def respond(request):
      self._check_key(request)
      values = body.parse(await _read_json(request, self._max_body_bytes))
      if values['model'] not in (None, self._model):
        raise self._no_model(values['model'])
      return await answer(request.receive, values)

    return Route(path, self._counted(path, respond), methods=['POST'])

  def _counted(self, path, respond):
    async def respond_counted(request: Request):
      try:
        response = await respond(request)
      except Exception as e:
        status = (await _on_error(request, e)).status_code
        self._metrics.count_answer(path, status)
        raise
      self._metrics.count_answer(path, getattr(response, 'status_code', 200))
      return response

    return respond_counted

  def _check_key(self, request):
    if not self._keys:
      return
    kind, _, key = request.headers.get('authorization', '').partition(' ')
    given = key.strip().encode('utf-8', 'surrogateescape')
    # All are compared, in constant time: how long it takes tells nothing.
    found = [hmac.compare_digest(given, k) for k in self._keys]
    if kind.lower() != 'bearer' or not any(found):
      raise ApiError(
        401,
        'the API key is missing or wrong: send Authorization: Bearer <key>',
        code='invalid_api_key',
        headers={'www-authenticate': 'Bearer'},
      )

  def _no_model(self, name):
    return ApiError(
      404,
      f'the model {name!r:.80} does not exist; there is {self._model!r}',
      param='model',
      code='model_not_found',
    )

  async def _tokenize(self, receive, values):
    del receive
    if (values['prompt'] is None) == (values['messages'] is None):
      raise ApiError(
        400,
        'give either prompt or messages',
        param='prompt',
        code='invalid_request',
      )
    if values['prompt'] is None:
      tokens = await asyncio.to_thread(self._generation.chat_tokens, values)
    else:
      tokens = await asyncio.to_thread(
        self._tokenizer.encode,
        values['prompt'],
        add_bos=values['add_special_tokens'],
      )
    return _json({'tokens': tokens, 'count': len(tokens)})

  async def _detokenize(self, receive, values):
    del receive
    text = await asyncio.to_thread(self._tokenizer.decode, values['tokens'])
    return _json({'prompt': text})

  async def _list_models(self, request):
    del request
    return _json({'object': 'list', 'data': [self._card]})

  async def _show_model(self, request):
    if request.path_params['model'] != self._model:
      raise self._no_model(request.path_params['model'])
    return _json(self._card)

  async def _openapi(self, request):
    del request
    return _json(describe(self._model, bool(self._keys)))

  async def _health(self, request):
    del request
    if self._engine.failure is not None:
      return _json({'status': 'failed'}, 503)
    return _json({'status': 'ok'})

  async def _ready(self, request):
    del request
    if not self._engine.is_accepting:
      return _json({'status': 'not accepting requests'}, 503)
    return _json({'status': 'ok'})

  async def _show_metrics(self, request):
    del request
    return Response(self._metrics.text(), media_type=self._metrics.content_type)


async def _read_json(request, max_bytes):
  kind = request.headers.get('content-type', '').partition(';')[0]
  if kind.strip().lower() != 'application/json':
    raise ApiError(
      415, f'send Content-Type: application/json, not {kind!r:.80}'
    )
  too_large = ApiError(413, f'the body has more than {max_bytes} bytes')
  length = request.headers.get('content-length', '')
  if length.isdecimal() and int(length) > max_bytes:
    raise too_large
  body = bytearray()
  async for chunk in request.stream():
    body += chunk
    if len(body) > max_bytes:
      raise too_large
  try:
    return json.loads(body, parse_float=_finite, parse_constant=_finite)
  except (ValueError, RecursionError) as e:
    raise ApiError(
      400, f'the body is not JSON: {e}', code='invalid_json'
    ) from None


def _finite(text):
  if not math.isfinite(value := float(text)):
    raise ValueError(f'{text} is not a finite number')
  return value


def _json(value, status=200):
  return Response(to_json(value), status, media_type='application/json')


async def _on_error(request, error):
  if isinstance(error, (ClientDisconnect, ClientGone)):
    return Response(status_code=_CLIENT_GONE)
  if isinstance(error, HTTPException):
    where = f'{request.method} {request.url.path!r:.80}'
    message = f'{where}: {error.detail}'
    error = ApiError(error.status_code, message, headers=error.headers)
  if not isinstance(error, ApiError):
    message = f'{type(error).__name__}: {error}'
    error = ApiError(500, message, code='server_error')
  response = _json(error.body(), error.status)
  response.headers.update(error.headers or {})
  return response
