"""The server does what its own description says, whatever is sent."""

import hypothesis
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.app import make_app

_POSTS = ('/v1/completions', '/v1/chat/completions', '/tokenize', '/detokenize')
_GETS = ('/v1/models', '/v1/models/{model}', '/health', '/ready')
_REFUSALS = ('invalid_request', 'conflicting_constraints')
_OPERATIONS = [(p, 'POST') for p in _POSTS] + [(p, 'GET') for p in _GETS]


@pytest.fixture(scope='module')
def description(llm):
  """The document, and the application that it is of, in this process."""
  engine = AsyncEngine(llm, max_unfinished=4096)
  app = make_app(llm, engine, model='tiny')
  config = SchemathesisConfig.from_dict({})
  yield schemathesis.openapi.from_asgi('/openapi.json', app, config=config)
  engine.close()
  assert engine.failure is None
  assert llm.engine.num_held_pages == llm.engine.num_unfinished == 0


def test_all_paths_are_described(description):
  described = {
    (operation.ok().path, operation.ok().method.upper())
    for operation in description.get_all_operations()
  }
  assert described == set(_OPERATIONS)


@pytest.mark.parametrize('mode', list(schemathesis.GenerationMode), ids=str)
@pytest.mark.parametrize('path, method', _OPERATIONS)
def test_answers_are_as_described(description, path, method, mode):
  """Status, type and schema of answers; and wrong bodies are refused."""
  if method == 'GET' and mode is schemathesis.GenerationMode.NEGATIVE:
    pytest.skip('it takes nothing that could be wrong')
  operation = description[path][method]
  statuses = []

  @hypothesis.settings(
    max_examples=20,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
  )
  @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
  def check(case):
    answer = case.call_and_validate(
      timeout=60, excluded_checks=[positive_data_acceptance]
    )
    statuses.append(answer.status_code)
    if mode is schemathesis.GenerationMode.POSITIVE and statuses[-1] != 200:
      # What the schema allows may be too much for this model, or not go
      # together; no parameter by itself is wrong.
      assert statuses[-1] == 400
      assert answer.json()['error']['code'] in _REFUSALS

  check()
  if mode is schemathesis.GenerationMode.POSITIVE:
    assert 200 in statuses
