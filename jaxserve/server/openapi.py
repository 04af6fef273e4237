"""`/openapi.json`: the server described by the tables that it checks with."""

from collections.abc import Mapping
from typing import Any

from jaxserve.server import tables
from jaxserve.server.errors import ERROR_SCHEMA
from jaxserve.server.parameters import Body

_ERRORS = {
  400: 'A parameter is wrong, unknown or not supported; it is named.',
  401: 'The API key is missing or wrong.',
  404: 'There is no such model.',
  413: 'The body is too large.',
  415: 'The body is not application/json.',
  429: 'Too many requests are unfinished.',
  500: 'The engine could not finish the request.',
  503: 'The server is shutting down, or its engine has failed.',
}
_STRING = {'type': 'string'}
_COUNT = {'type': 'integer', 'minimum': 0}
_IDS = {'type': 'array', 'items': _COUNT}


def _object(required, **optional):
  return {
    'type': 'object',
    'properties': required | optional,
    'required': list(required),
  }


def _list(items):
  return {'type': 'array', 'items': items}


def _answer(kind, **choice):
  choice = _object(
    {
      'index': _COUNT,
      'finish_reason': {'enum': ['stop', 'length']},
      'logprobs': {'type': ['object', 'null']},
      **choice,
    },
    token_ids=_IDS,
  )
  usage = _object(
    {
      'prompt_tokens': _COUNT,
      'completion_tokens': _COUNT,
      'total_tokens': _COUNT,
    },
    prompt_tokens_details=_object({'cached_tokens': _COUNT}),
  )
  return _object(
    {
      'id': _STRING,
      'object': {'enum': [kind]},
      'created': _COUNT,
      'model': _STRING,
      'choices': _list(choice),
      'usage': usage,
    }
  )


_MODEL = _object(
  {
    'id': _STRING,
    'object': {'enum': ['model']},
    'created': _COUNT,
    'owned_by': _STRING,
    'max_model_len': _COUNT,
  }
)
_MESSAGE = _object(
  {'role': {'enum': ['assistant']}, 'content': _STRING, 'refusal': {}}
)
# Name -> schema of an answer.
_ANSWERS = {
  'Completion': _answer('text_completion', text=_STRING),
  'ChatCompletion': _answer('chat.completion', message=_MESSAGE),
  'Model': _MODEL,
  'Models': _object({'object': {'enum': ['list']}, 'data': _list(_MODEL)}),
  'Tokens': _object({'tokens': _IDS, 'count': _COUNT}),
  'Text': _object({'prompt': _STRING}),
  'Status': _object({'status': _STRING}),
  'Error': ERROR_SCHEMA,
}


def describe(model: str, has_key: bool) -> dict[str, Any]:
  """The OpenAPI 3.1 document.

  Args:
    model: Name of the one model there is.
    has_key: Whether an API key is needed.
  """
  bodies = (tables.COMPLETION, tables.CHAT, tables.TOKENIZE, tables.DETOKENIZE)
  schemas = dict(_ANSWERS) | {b.name: _request(b, model) for b in bodies}
  keyed = (400, 401) if has_key else (400,)
  generates = (*keyed, 404, 413, 415, 429, 500, 503)
  reads = (*keyed, 404, 413, 415)
  lists = (401,) if has_key else ()
  paths = {
    '/v1/completions': _post(
      'Continues prompts.', tables.COMPLETION, 'Completion', generates, True
    ),
    '/v1/chat/completions': _post(
      'Answers a conversation.', tables.CHAT, 'ChatCompletion', generates, True
    ),
    '/tokenize': _post('Text to tokens.', tables.TOKENIZE, 'Tokens', reads),
    '/detokenize': _post('Tokens to text.', tables.DETOKENIZE, 'Text', reads),
    '/v1/models': _get('Lists the model.', 'Models', lists),
    '/v1/models/{model}': _get('The model.', 'Model', (*lists, 404)),
    '/health': _get('200 while the engine works.', 'Status', (503,)),
    '/ready': _get('200 while requests are taken.', 'Status', (503,)),
  }
  paths['/v1/models/{model}']['get']['parameters'] = [
    {
      'name': 'model',
      'in': 'path',
      'required': True,
      'schema': {'type': 'string', 'enum': [model]},
    }
  ]
  document = {
    'openapi': '3.1.0',
    'info': {'title': 'OneMesh', 'version': '1'},
    'paths': paths,
    'components': {'schemas': schemas},
  }
  if has_key:
    key = {'type': 'http', 'scheme': 'bearer'}
    document['components']['securitySchemes'] = {'key': key}
    for path, item in paths.items():
      if path not in ('/health', '/ready'):
        for operation in item.values():
          operation['security'] = [{'key': []}]
  return document


def _request(body: Body, model: str) -> Mapping[str, Any]:
  """A table's schema, with the names of models that there are."""
  properties = dict(body.schema['properties'])
  properties['model'] = {
    'description': properties['model']['description'],
    'enum': [model] if 'model' in body.schema['required'] else [model, None],
  }
  return body.schema | {'properties': properties}


def _json(name):
  schema = {'$ref': f'#/components/schemas/{name}'}
  return {'application/json': {'schema': schema}}


def _responses(answer, errors, streams=False):
  content = _json(answer)
  if streams:
    content['text/event-stream'] = {'schema': {'type': 'string'}}
  ok = {'200': {'description': 'The answer.', 'content': content}}
  return ok | {
    str(status): {
      'description': _ERRORS[status],
      'content': _json('Status' if answer == 'Status' else 'Error'),
    }
    for status in errors
  }


def _get(summary, answer, errors):
  return {'get': {'summary': summary, 'responses': _responses(answer, errors)}}


def _post(summary, body, answer, errors, streams=False):
  return {
    'post': {
      'summary': summary,
      'requestBody': {'required': True, 'content': _json(body.name)},
      'responses': _responses(answer, errors, streams),
    }
  }
