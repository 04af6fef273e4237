"""A tiny model behind a real server on a free port."""

import contextlib
import threading
import urllib.request

import openai
import pytest

from jaxserve import LLM
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.app import make_app
from jaxserve.server.serving import Server
from jaxserve.server.serving import listening_socket

_TEMPLATE = """\
{%- for m in messages %}
{{- raise_exception('no ' + m.role) if m.role == 'developer' }}
{{- m.role[0] + ':' + m.content + '\n' }}
{%- endfor %}
{{- 'a:' if add_generation_prompt }}
{{- mood if mood is defined }}"""


@pytest.fixture(scope='session')
def llm(tiny, small_engine, tmp_path_factory):
  """The tiny model with bytes as tokens."""
  template = tmp_path_factory.mktemp('chat') / 'template.jinja'
  template.write_text(_TEMPLATE)
  with LLM(
    tiny.params,
    config=tiny.config,
    tokenizer='byte',
    chat_template=template,
    engine=small_engine,
  ) as llm:
    yield llm


@pytest.fixture(scope='session')
def key():
  return 'a key that is secret'


@contextlib.contextmanager
def _serving(app, engine, **kwargs):
  """Runs a server in a thread, and drains it at the end."""
  is_ready = threading.Event()
  server = Server(
    app,
    engine,
    listening_socket('127.0.0.1', 0),
    on_ready=lambda url: is_ready.set(),
    **kwargs,
  )
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    assert is_ready.wait(60)
    yield server
  finally:
    server.stop()
    thread.join()


@pytest.fixture(scope='module')
def engine(llm):
  """One that serves alone: a module at a time uses the model."""
  engine = AsyncEngine(llm, max_unfinished=64)
  yield engine
  engine.close()
  assert llm.engine.num_held_pages == llm.engine.num_unfinished == 0


@pytest.fixture(scope='module')
def server(llm, engine, key):
  app = make_app(
    llm,
    engine,
    model='tiny',
    api_keys=['another', key],
    max_body_bytes=20_000,
  )
  with _serving(app, engine) as server:
    yield server


@pytest.fixture(scope='module')
def client(server, key):
  """OpenAI's own."""
  with openai.OpenAI(
    base_url=f'{server.url}/v1', api_key=key, max_retries=0, timeout=120
  ) as client:
    yield client


@pytest.fixture(scope='module')
def get(server, key):
  """Reads a page as text."""

  def get(path):
    request = urllib.request.Request(
      server.url + path, headers={'authorization': f'Bearer {key}'}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.read().decode()

  return get
