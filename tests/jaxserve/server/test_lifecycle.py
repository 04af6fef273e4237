"""Metrics, health, and what a server does as it ends."""

import asyncio
import json
import threading
import time

from prometheus_client import parser
import pytest
from starlette.testclient import TestClient

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.app import make_app

_BODY = {'model': 'tiny', 'prompt': 'hello', 'temperature': 0, 'max_tokens': 8}


@pytest.fixture
def engine(llm):
  """One of this test alone."""
  engine = AsyncEngine(llm)
  yield engine
  engine.close()


@pytest.fixture
def client(llm, engine):
  with TestClient(make_app(llm, engine, model='tiny')) as client:
    yield client


def _metrics(client):
  answer = client.get('/metrics')
  assert answer.headers['content-type'].startswith('text/plain; version=')
  return {
    (s.name.removeprefix('onemesh_'), *s.labels.values()): s.value
    for family in parser.text_string_to_metric_families(answer.text)
    for s in family.samples
  }


def test_metrics_count_what_happened(client, llm):
  before = _metrics(client)
  for _ in range(2):
    body = _BODY | {'n': 2, 'prompt': 'a prompt like no other'}
    client.post('/v1/completions', json=body)
  client.post('/v1/completions', json={})
  after = _metrics(client)
  change = lambda *key: after[key] - before.get(key, 0)
  assert change('generated_tokens_total') == 2 * 2 * 8
  assert change('prompt_tokens_total') == 2 * 23
  # The second time, whole pages of 4 are found.
  assert change('prefix_hit_tokens_total') >= 20
  assert change('continuations_finished_total', 'length') == 4
  assert change('http_answers_total', '/v1/completions', '200') == 2
  assert change('http_answers_total', '/v1/completions', '400') == 1
  assert change('time_to_first_token_seconds_count') == 2
  assert change('request_seconds_count') == 2
  assert change('inter_token_seconds_count') == 2 * 2 * 7
  assert 0 < change('time_to_first_token_seconds_sum') < 60
  assert change('steps_total') >= 16
  assert change('computed_tokens_total') >= 23 + 2 * 2 * 7
  assert change('padding_tokens_total') > 0
  assert after['pages',] == 96 and after['pages_in_use',] == 0
  assert after['requests_running',] == after['requests_waiting',] == 0
  assert after['programs',] >= 2 and after['compile_seconds',] > 0
  assert after['late_compiles_total',] == 0
  assert after['ready',] == 1
  for name in ('preemptions_total', 'failed_steps_total', 'poisoned_total'):
    assert change(name) == 0


def test_health(client, engine):
  assert client.get('/health').status_code == 200
  assert client.get('/ready').status_code == 200
  engine.refuse('a reason of ours')
  assert client.get('/health').status_code == 200
  assert client.get('/ready').status_code == 503
  for body in (_BODY, _BODY | {'stream': True}):
    answer = client.post('/v1/completions', json=body)
    assert answer.status_code == 503
    assert answer.json()['error']['message'] == 'a reason of ours'
    assert answer.json()['error']['type'] == 'service_unavailable_error'


def test_a_failing_engine(client, engine, llm, monkeypatch):
  def fail():
    raise ZeroDivisionError('by the scheduler')

  monkeypatch.setattr(llm.engine, 'step', fail)
  answer = client.post('/v1/completions', json=_BODY)
  assert answer.status_code == 503
  assert 'ZeroDivisionError' in answer.json()['error']['message']
  assert client.get('/health').status_code == 503
  assert client.get('/ready').status_code == 503


def test_a_failing_request(client, llm, monkeypatch):
  """A step that raises ends whom it ran; the server goes on."""
  expected = client.post('/v1/completions', json=_BODY).json()['choices']

  def fail(*_):
    raise RuntimeError('out of something')

  with monkeypatch.context() as m:
    m.setattr(llm.runner, 'run', fail)
    answer = client.post('/v1/completions', json=_BODY)
    assert answer.status_code == 500
    assert 'out of something' in answer.json()['error']['message']
    answer = client.post('/v1/completions', json=_BODY | {'stream': True})
    events = [e for e in answer.text.split('\n\n') if e]
    assert 'out of something' in json.loads(events[-2][6:])['error']['message']
    assert events[-1] == 'data: [DONE]'
  assert client.get('/health').status_code == 200
  answer = client.post('/v1/completions', json=_BODY)
  assert answer.json()['choices'] == expected


@pytest.mark.parametrize('stream', [False, True])
def test_closing_tells_the_clients_that_wait(
  client, engine, llm, monkeypatch, stream
):
  step = llm.engine.step
  monkeypatch.setattr(llm.engine, 'step', lambda: time.sleep(0.02) or step())

  def close():
    while not engine.num_unfinished:
      time.sleep(0.005)
    time.sleep(0.1)
    assert not asyncio.run(engine.drain(0.01))
    engine.close()

  thread = threading.Thread(target=close)
  thread.start()
  body = _BODY | {'max_tokens': 80, 'stream': stream}
  answer = client.post('/v1/completions', json=body)
  thread.join()
  assert answer.status_code == (200 if stream else 503)
  text = answer.text.removesuffix('data: [DONE]\n\n').strip()
  error = json.loads(text.split('data: ')[-1])['error']
  assert error['type'] == 'service_unavailable_error'
  assert llm.engine.num_held_pages == llm.engine.num_unfinished == 0
