"""Whatever is wrong is named, and harms nobody."""

import http.client
import json
import socket
import urllib.parse

import openai
import pytest
from starlette.testclient import TestClient

from jaxserve.server.app import make_app

_PROMPT = {'model': 'tiny', 'prompt': 'hello', 'max_tokens': 4}
_CHAT = {
  'model': 'tiny',
  'messages': [{'role': 'user', 'content': 'hi'}],
  'max_tokens': 4,
}


@pytest.fixture(scope='module')
def send(server, key):
  """Sends bytes as they are; returns status, headers and parsed body."""

  def send(path, body=b'', method='POST', **headers):
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(
      address.hostname, address.port, timeout=60
    )
    headers = {
      'content-type': 'application/json',
      'authorization': f'Bearer {key}',
    } | {k.replace('_', '-'): v for k, v in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, json.loads(answer.read())

  return send


@pytest.fixture(autouse=True)
def unharmed(client, engine):
  """After each test the server answers as before it."""
  before = client.completions.create(temperature=0, **_PROMPT)
  yield
  after = client.completions.create(temperature=0, **_PROMPT)
  assert after.choices == before.choices
  assert engine.num_unfinished == engine.num_held_pages == 0
  assert engine.failure is None


def _check_error(body, kind, words, param=None):
  error = body['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['type'] == kind
  assert words in error['message'], error['message']
  assert error['param'] == param


@pytest.mark.parametrize(
  'body, words',
  [
    (b'', 'Expecting value'),
    (b'{"model": "tiny"', 'Expecting'),
    (b'{"model": "tiny", "prompt": "x", "top_p": NaN}', 'NaN is not a finite'),
    (b'{"model": "tiny", "prompt": "x", "top_p": 1e999}', 'is not a finite'),
    (b'\xff\xfe\xfd', 'not JSON'),
    (b'[' * 9000, 'not JSON'),
    (b'9' * 9000, 'not JSON'),
    (b'[]', 'the body must be an object, not []'),
    (b'null', 'the body must be an object, not null'),
  ],
)
def test_bodies_that_are_no_object(send, body, words):
  status, _, answer = send('/v1/completions', body)
  assert status == 400
  _check_error(answer, 'invalid_request_error', words)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'prompt': None}, 'prompt must be a text, a list of texts'),
    ({'prompt': ''}, 'prompt must be a text, a list of texts'),
    ({'prompt': []}, 'prompt must be a text, a list of texts'),
    ({'model': 7}, 'model must be a text, not 7'),
    ({'temperature': 'hot'}, "temperature must be a number or null, not 'hot'"),
    ({'temperature': -1}, 'temperature must be at least 0, not -1'),
    ({'temperature': True}, 'temperature must be a number or null, not true'),
    ({'top_p': 0}, 'top_p must be above 0, not 0'),
    ({'top_p': 1.5}, 'top_p must be at most 1, not 1.5'),
    ({'max_tokens': 1.5}, 'max_tokens must be an integer or null, not 1.5'),
    ({'n': 0}, 'n must be at least 1, not 0'),
    ({'n': 1000}, 'n must be at most 128, not 1000'),
    ({'stop': [1]}, 'stop[0] must be a text, not 1'),
    ({'logit_bias': {'x': 1}}, 'logit_bias.x is not a known parameter'),
    ({'logit_bias': {'1': 200}}, 'logit_bias.1 must be at most 100'),
    ({'presence_penalty': 3}, 'presence_penalty must be at most 2'),
    ({'stream': 'yes'}, 'stream must be true or false or null'),
    ({'echoe': True}, 'echoe is not a known parameter; did you mean echo?'),
    ({'suffix': 'x'}, 'suffix is not supported by this server'),
    ({'best_of': 3}, 'best_of is not supported by this server'),
    (
      {'response_format': {'type': 'xml'}},
      "response_format must be an object of type 'text', 'json_object' or ",
    ),
    (
      {'response_format': {'type': 'json_schema'}},
      'response_format.json_schema is required',
    ),
    (
      {'response_format': {'type': 'json_object', 'schema': {}}},
      'response_format.schema is not a known parameter',
    ),
  ],
)
def test_wrong_parameters_of_completions(send, change, words):
  status, _, answer = send('/v1/completions', json.dumps(_PROMPT | change))
  assert status == 400
  [name] = change
  param = words.partition(' ')[0]
  assert param.startswith(name)
  _check_error(answer, 'invalid_request_error', words, param)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'messages': []}, 'messages must have at least 1 items'),
    ({'messages': 'hi'}, "messages must be a list, not 'hi'"),
    ({'messages': [{'content': 'x'}]}, 'messages[0].role is required'),
    (
      {'messages': [{'role': 'tool', 'content': 'x'}]},
      "messages[0].role must be one of 'system', 'developer', 'user', ",
    ),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
      'messages[0].content must be a text, or a list of',
    ),
    (
      {'messages': [{'role': 'user', 'content': 'x', 'audio': 1}]},
      'messages[0].audio is not a known parameter',
    ),
    ({'tools': [{'type': 'function'}]}, 'tools is not supported'),
    ({'reasoning_effort': 'low'}, 'reasoning_effort is not supported'),
    ({'store': True}, 'store is not supported'),
    ({'top_logprobs': 2}, 'top_logprobs needs logprobs'),
    ({'stream_options': {}}, 'stream_options needs stream'),
    ({'prompt': 'x'}, 'prompt is not a known parameter'),
  ],
)
def test_wrong_parameters_of_chats(send, change, words):
  status, _, answer = send('/v1/chat/completions', json.dumps(_CHAT | change))
  assert status == 400
  _check_error(answer, 'invalid_request_error', words, words.partition(' ')[0])


@pytest.mark.parametrize(
  'change, words',
  [
    ({'prompt': 'x' * 200}, 'the prompt has 201 tokens'),
    ({'prompt': [1, 9999]}, 'token ids [9999] are not in 0..263'),
    ({'logprobs': 6}, 'logprobs=6 is above max_logprobs=5'),
    ({'min_tokens': 5}, 'min_tokens=5 must be at least 0 and at most'),
    ({'regex': '('}, 'regex'),
    (
      {'regex': 'a', 'response_format': {'type': 'json_object'}},
      'json_schema and regex cannot both be given',
    ),
    ({'bad_token_ids': [264]}, 'bad_token_ids [264] are not in 0..263'),
    ({'prompt': ['x'] * 65}, '65 prompts with n=1 ask for 65 continuations'),
    ({'max_tokens': 0}, 'max_tokens=0 needs echo'),
    ({'echo': True, 'logprobs': 1, 'stream': True}, 'echo with logprobs'),
  ],
)
@pytest.mark.parametrize('stream', [False, True])
def test_what_the_engine_refuses(send, change, words, stream):
  body = json.dumps(_PROMPT | {'stream': stream} | change)
  status, headers, answer = send('/v1/completions', body)
  # Before the first byte of a stream, too.
  assert status == 400 and headers['content-type'] == 'application/json'
  assert words in answer['error']['message'], answer
  assert 'request ' not in answer['error']['message']


def test_what_the_chat_template_refuses(send):
  body = _CHAT | {'messages': [{'role': 'developer', 'content': 'x'}]}
  status, _, answer = send('/v1/chat/completions', json.dumps(body))
  assert status == 400
  _check_error(
    answer,
    'invalid_request_error',
    'the chat template refuses the messages: no developer',
    'messages',
  )


def test_half_characters_are_replaced(send):
  body = json.dumps(_PROMPT | {'prompt': '\ud800x', 'echo': True})
  status, _, answer = send('/v1/completions', body)
  assert status == 200
  assert answer['choices'][0]['text'].startswith('?x')
  status, _, answer = send(
    '/v1/completions', json.dumps(_PROMPT | {'\udfff': 1})
  )
  assert status == 400 and answer['error']['param'] == '?'


def test_large_bodies(send):
  body = json.dumps(_PROMPT | {'prompt': 'x' * 20_000})
  status, _, answer = send('/v1/completions', body)
  assert status == 413
  _check_error(answer, 'invalid_request_error', 'more than 20000 bytes')
  # Without a length, what comes is counted.
  chunks = (b' ' * 5_000 for _ in range(5))
  assert send('/v1/completions', chunks)[0] == 413


def test_other_kinds_of_bodies(send):
  body = json.dumps(_PROMPT)
  status, _, answer = send(
    '/v1/completions', body, content_type='application/x-www-form-urlencoded'
  )
  assert status == 415
  _check_error(
    answer, 'invalid_request_error', 'Content-Type: application/json'
  )
  assert send('/v1/completions', body, content_type='')[0] == 415
  utf8 = 'Application/JSON; charset=utf-8'
  assert send('/v1/completions', body, content_type=utf8)[0] == 200


def test_unknown_models_and_paths(send, client):
  with pytest.raises(openai.NotFoundError) as e:
    client.completions.create(model='huge', prompt='x')
  assert e.value.code == 'model_not_found' and "'huge'" in str(e.value)
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('huge')
  status, _, answer = send('/v1/embeddings', b'{}')
  assert status == 404
  _check_error(answer, 'not_found_error', "'/v1/embeddings'")
  status, headers, _ = send('/v1/completions', method='DELETE')
  assert (status, headers['allow']) == (405, 'POST')


@pytest.mark.parametrize(
  'header',
  ['', 'Bearer', 'Bearer wrong', 'Basic {key}', '{key}', 'Bearer \xe9'],
)
def test_keys(send, key, header):
  header = header.format(key=key)
  for path, method in (
    ('/v1/completions', 'POST'),
    ('/v1/chat/completions', 'POST'),
    ('/tokenize', 'POST'),
    ('/detokenize', 'POST'),
    ('/v1/models', 'GET'),
    ('/openapi.json', 'GET'),
  ):
    status, headers, answer = send(
      path, json.dumps(_PROMPT), method, authorization=header
    )
    assert status == 401 and headers['www-authenticate'] == 'Bearer'
    _check_error(answer, 'authentication_error', 'API key')
  assert send('/health', method='GET', authorization=header)[0] == 200
  assert (
    send('/v1/models', method='GET', authorization='bearer another')[0] == 200
  )


def test_a_full_queue(send, client, engine):
  args = dict(model='tiny', prompt='x', max_tokens=60, n=64, stream=True)
  with client.completions.create(**args) as stream:
    next(iter(stream))
    status, headers, answer = send('/v1/completions', json.dumps(_PROMPT))
    assert (status, headers['retry-after']) == (429, '1')
    _check_error(answer, 'rate_limit_error', '64 continuations are unfinished')
    with pytest.raises(openai.RateLimitError):
      client.completions.create(**_PROMPT)
  _wait_until_idle(client, engine)


def _wait_until_idle(client, engine):
  while engine.num_unfinished:
    client.models.list()


def test_clients_that_go_away(server, engine, client, key):
  address = urllib.parse.urlsplit(server.url)
  for stream in (False, True):
    body = json.dumps(_PROMPT | dict(max_tokens=80, n=60, stream=stream))
    with socket.create_connection((address.hostname, address.port)) as s:
      s.sendall(
        f'POST /v1/completions HTTP/1.1\r\nhost: x\r\n'
        f'authorization: Bearer {key}\r\ncontent-type: application/json\r\n'
        f'content-length: {len(body)}\r\n\r\n{body}'.encode()
      )
      while engine.num_unfinished < 60:
        client.models.list()
    before = engine.metrics.num_generated
    _wait_until_idle(client, engine)
    assert engine.metrics.num_generated - before < 60 * 80 / 2


def test_without_a_chat_template(llm, engine, monkeypatch):
  monkeypatch.setattr(llm, 'chat_template', None)
  with TestClient(make_app(llm, engine, model='tiny')) as client:
    answer = client.post('/v1/chat/completions', json=_CHAT)
    assert answer.status_code == 400
    _check_error(
      answer.json(),
      'invalid_request_error',
      'the model tiny has no chat template',
      'messages',
    )
    assert client.post('/tokenize', json=_CHAT).status_code == 400
