"""The binary as a process: flags, answers, and how signals end it."""

import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.parse

from flax import linen as nn
import jax
import jax.numpy as jnp
import openai
import pytest

from jaxtrain.checkpoints.huggingface import load_huggingface
from jaxtrain.checkpoints.huggingface import save_huggingface
from jaxtrain.models.transformer import Transformer

_ROOT = pathlib.Path(__file__).parent.parent.parent
_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_ENGINE = dict(
  max_num_requests=4,
  page_size=16,
  max_seq_len=1024,
  max_step_tokens=16,
  token_buckets=(16,),
)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A directory with a tiny model of bytes and a chat template."""
  config, _ = load_huggingface(_GOLDEN / 'llama3')
  config = dataclasses.replace(config, vocab_size=264, max_seq_len=1024)
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(lambda k: nn.unbox(Transformer(config).init(k, tokens)))
  path = tmp_path_factory.mktemp('models') / 'tiny'
  save_huggingface(path, config, init(jax.random.key(0))['params'])
  (path / 'chat_template.jinja').write_text('{{ messages[0].content }}')
  return path


class _Process:
  """A server and its address."""

  def __init__(self, *args):
    env = os.environ | {
      'PYTHONPATH': str(_ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(_ROOT / '.cache' / 'jax_binaries'),
    }
    env.pop('XLA_FLAGS', None)
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'experiments.serve', *args],
      cwd=_ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def wait_until_ready(self):
    line = self.process.stdout.readline()
    found = re.fullmatch(r'serving tiny at (http://127\.0\.0\.1:\d+)\n', line)
    assert found, (line, self.process.stderr.read())
    return found[1]

  def end(self):
    """Waits for the end; returns the exit status and what was printed."""
    out, err = self.process.communicate(timeout=120)
    return self.process.returncode, out, err


@pytest.fixture
def start(model):
  started = []

  def start(*args):
    started.append(
      _Process(
        f'--model={model}',
        '--tokenizer=byte',
        f'--engine={json.dumps(_ENGINE)}',
        '--port=0',
        *args,
      )
    )
    return started[-1]

  yield start
  for server in started:
    if server.process.poll() is None:
      server.process.kill()
      server.process.communicate()


def _streams(client, count, max_tokens, **kwargs):
  """Running streams, and the number of tokens that each has got so far."""
  streams = [
    iter(
      client.completions.create(
        model='tiny',
        prompt='hello',
        max_tokens=max_tokens,
        stream=True,
        extra_body={'ignore_eos': True, 'return_token_ids': True},
        **kwargs,
      )
    )
    for _ in range(count)
  ]
  return streams, [len(next(s).choices[0].token_ids) for s in streams]


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(start, tmp_path):
  (tmp_path / 'keys').write_text('one\ntwo\n')
  server = start(f'--api_key_file={tmp_path / "keys"}')
  url = server.wait_until_ready()
  client = openai.OpenAI(base_url=f'{url}/v1', api_key='two', max_retries=0)
  answer = client.chat.completions.create(
    model='tiny', messages=[{'role': 'user', 'content': 'hi'}], max_tokens=4
  )
  assert answer.usage.prompt_tokens == 2
  with pytest.raises(openai.AuthenticationError):
    client.with_options(api_key='three').models.list()

  address = urllib.parse.urlsplit(url)
  other = http.client.HTTPConnection(address.hostname, address.port)
  # Of six continuations, four run.
  streams, num_tokens = _streams(client, 3, 200, n=2)
  server.process.send_signal(signal.SIGTERM)
  # New requests are refused as soon as the signal has been seen.
  status = 200
  while status == 200:
    other.request('GET', '/ready')
    answer = other.getresponse()
    status, _ = answer.status, answer.read()
  assert status == 503
  with pytest.raises(openai.InternalServerError, match='shutting down') as e:
    _streams(client, 1, 4)
  assert e.value.status_code == 503
  # Those that ran get all they asked for.
  for i, stream in enumerate(streams):
    for chunk in stream:
      num_tokens[i] += len(chunk.choices[0].token_ids)
  assert num_tokens == [400] * 3
  status, out, err = server.end()
  assert (status, out) == (0, ''), err
  assert 'Traceback' not in err


def test_what_is_not_drained_in_time_is_told(start):
  server = start('--drain_timeout_s=0')
  url = server.wait_until_ready()
  client = openai.OpenAI(base_url=f'{url}/v1', api_key='-', max_retries=0)
  streams, _ = _streams(client, 3, 1000)
  server.process.send_signal(signal.SIGINT)
  for stream in streams:
    with pytest.raises(openai.APIError, match='shutting down'):
      for _ in stream:
        pass
  status, _, err = server.end()
  assert status == 1 and 'Traceback' not in err


_WRONG = [
  (dict(model='/nowhere'), "serve: no model at '/nowhere'"),
  (dict(engine='{"pages": 1}'), "unexpected keyword argument 'pages'"),
  (dict(engine='{'), "serve: --engine='{': "),
  (dict(engine='{"page_size": 0}'), 'serve: page_size=0 must be at least 1'),
  (dict(api_key_file='/nowhere'), "No such file or directory: '/nowhere'"),
  (dict(api_key_file='/dev/null'), '/dev/null: no key in it'),
  (dict(chat_template='/nowhere'), "serve: no chat template at '/nowhere'"),
  (dict(tokenizer='/nowhere'), "serve: no chat template at '/nowhere'"),
  (dict(host='256.0.0.1'), 'serve: --host=256.0.0.1 --port='),
  # The test listens there.
  (dict(), 'serve: --host=127.0.0.1 --port='),
]
# One process tries them all; another binary's flags may be defined in this one.
_TRY_ALL = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from experiments import serve

flags.FLAGS.mark_as_parsed()
for values in json.loads(sys.argv[1]):
  with flagsaver.flagsaver(**values):
    try:
      serve.main(['serve'])
    except SystemExit as e:
      print(json.dumps(e.code))
"""


def test_wrong_flags_are_one_line():
  with socket.create_server(('127.0.0.1', 0)) as other:
    base = dict(model='/nowhere', port=other.getsockname()[1])
    cases = [base | values for values, _ in _WRONG]
    cases[0]['port'] = 0
    done = subprocess.run(
      [sys.executable, '-c', _TRY_ALL, json.dumps(cases)],
      cwd=_ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=120,
    )
  messages = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(messages) == len(_WRONG), done.stderr
  for message, (_, words) in zip(messages, _WRONG, strict=True):
    assert words in message and '\n' not in message
