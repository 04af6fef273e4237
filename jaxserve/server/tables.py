"""What each endpoint accepts.

The names are those of https://platform.openai.com/docs/api-reference, and of
vLLM where OpenAI has none.
"""

import dataclasses

from jaxserve.server.parameters import Body
from jaxserve.server.parameters import Field


def _number(low=None, high=None, above=None, kind='number'):
  bounds = dict(minimum=low, maximum=high, exclusiveMinimum=above)
  return {
    'type': kind,
    **{name: x for name, x in bounds.items() if x is not None},
  }


def _integer(low=None, high=None):
  return _number(low, high, kind='integer')


def _list(items, low=0, high=None):
  schema = {'type': 'array', 'items': items, 'minItems': low}
  return schema if high is None else {**schema, 'maxItems': high}


def _unsupported(name, *inert):
  schema = {'enum': list(inert)} if inert else {'type': 'null'}
  return Field(name, schema, 'Not supported.', is_supported=False)


_STRING = {'type': 'string'}
_BOOLEAN = {'type': 'boolean'}
_TOKEN = _integer(0, 2**31 - 1)
_TOKENS = _list(_TOKEN, 1)

_PROMPT = {
  'anyOf': [
    {'type': 'string', 'minLength': 1},
    _list({'type': 'string', 'minLength': 1}, 1, 256),
    _TOKENS,
    _list(_TOKENS, 1, 256),
  ],
  'description': 'a text, a list of texts, a list of token ids, or a list of '
  'such lists; none of them empty',
}
_STOP = {
  'anyOf': [
    {'type': 'string', 'minLength': 1},
    _list({'type': 'string', 'minLength': 1}, 0, 16),
  ],
  'description': 'a text or a list of up to 16; none of them empty',
}
_LOGIT_BIAS = {
  'type': 'object',
  'patternProperties': {'^(0|[1-9][0-9]{0,8})$': _number(-100, 100)},
  'additionalProperties': False,
}
_JSON_SCHEMA = {
  'type': 'object',
  'properties': {
    'name': _STRING,
    'description': _STRING,
    'schema': {'type': 'object'},
    'strict': {'type': ['boolean', 'null']},
  },
  'required': ['schema'],
  'additionalProperties': False,
}


def _format(kind, **properties):
  return {
    'type': 'object',
    'properties': {'type': {'enum': [kind]}, **properties},
    'required': ['type', *properties],
    'additionalProperties': False,
  }


_RESPONSE_FORMAT = {
  'anyOf': [
    _format('text'),
    _format('json_object'),
    _format('json_schema', json_schema=_JSON_SCHEMA),
  ],
  'description': "an object of type 'text', 'json_object' or 'json_schema'",
}
_CONTENT = {
  'anyOf': [_STRING, _list(_format('text', text=_STRING), 1)],
  'description': "a text, or a list of {'type': 'text', 'text': ...}",
}
_MESSAGE = {
  'type': 'object',
  'properties': {
    'role': {
      'type': 'string',
      'enum': ['system', 'developer', 'user', 'assistant'],
    },
    'content': _CONTENT,
    'name': _STRING,
    'refusal': {'type': 'null'},
    'tool_calls': {'type': 'null'},
  },
  'required': ['role', 'content'],
  'additionalProperties': False,
}
_STREAM_OPTIONS = {
  'type': 'object',
  'properties': {
    'include_usage': _BOOLEAN,
    'include_obfuscation': {'enum': [False]},
  },
  'additionalProperties': False,
}

_MODEL = Field('model', _STRING, 'Name of the model.', required=True)
_MESSAGES = Field(
  'messages', _list(_MESSAGE, 1, 4096), 'The conversation.', required=True
)
_TEMPLATE_FIELDS = (
  Field(
    'add_generation_prompt',
    _BOOLEAN,
    'End the prompt with what starts an answer.',
    default=True,
  ),
  Field(
    'chat_template_kwargs',
    {'type': 'object'},
    'Variables of the chat template.',
  ),
)
_SHARED = (
  _MODEL,
  Field(
    'temperature',
    _number(0, 1e6),
    'Divides the logits; 0 is greedy.',
    'temperature',
    default=1.0,
  ),
  Field(
    'top_p',
    _number(above=0, high=1),
    'Keep the smallest set of likely tokens with this much probability.',
    'top_p',
    default=1.0,
  ),
  Field(
    'top_k',
    _integer(0, 2**31 - 1),
    'Keep the k most likely tokens; 0 keeps all.',
    'top_k',
  ),
  Field(
    'min_p',
    _number(0, 1),
    'Keep tokens at least this likely relative to the most likely one.',
    'min_p',
  ),
  Field('n', _integer(1, 128), 'Continuations of each prompt.', 'n', default=1),
  Field(
    'seed',
    _integer(-(2**63), 2**63 - 1),
    'The same seed gives the same tokens, whatever else runs.',
    'seed',
  ),
  Field('stop', _STOP, 'Texts that end the generation.', 'stop'),
  Field(
    'stop_token_ids', _list(_TOKEN), 'Tokens that end it.', 'stop_token_ids'
  ),
  Field('ignore_eos', _BOOLEAN, 'Go on past the end.', 'ignore_eos'),
  Field(
    'min_tokens',
    _integer(0, 2**31 - 1),
    'No stop token is drawn before this many.',
    'min_tokens',
  ),
  Field(
    'presence_penalty',
    _number(-2, 2),
    'Subtracted from the logits of tokens already generated.',
    'presence_penalty',
  ),
  Field(
    'frequency_penalty',
    _number(-2, 2),
    'The same, times how often.',
    'frequency_penalty',
  ),
  Field(
    'repetition_penalty',
    _number(above=0, high=1e6),
    'Divides the positive logits, and multiplies the negative ones, of tokens '
    'of prompt and continuation.',
    'repetition_penalty',
  ),
  Field(
    'logit_bias',
    _LOGIT_BIAS,
    'Token id -> value added to its logit.',
    'logit_bias',
  ),
  Field(
    'allowed_token_ids',
    _TOKENS,
    'Only these can be drawn.',
    'allowed_token_ids',
  ),
  Field(
    'bad_token_ids',
    _list(_TOKEN),
    'These cannot be drawn.',
    'bad_token_ids',
  ),
  Field(
    'processed_logprobs',
    _BOOLEAN,
    'Log-probabilities of the distribution that tokens were drawn from, in '
    'place of the model’s own.',
    'processed_logprobs',
  ),
  Field(
    'regex',
    {'type': 'string', 'minLength': 1},
    'The text matches this regular expression.',
    'regex',
  ),
  Field(
    'response_format', _RESPONSE_FORMAT, 'The text is JSON, of this schema.'
  ),
  Field('stream', _BOOLEAN, 'Send text as it comes.', default=False),
  Field('stream_options', _STREAM_OPTIONS, 'Needs `stream`.'),
  Field(
    'priority',
    _integer(-(2**31), 2**31 - 1),
    'Larger runs earlier, where the scheduler looks at it.',
    default=0,
  ),
  Field(
    'user',
    {'type': 'string', 'maxLength': 256},
    'Whose request it is, where the scheduler is fair to users.',
    default='',
  ),
  Field(
    'return_token_ids',
    _BOOLEAN,
    'Put `token_ids` into each choice.',
    default=False,
  ),
)

COMPLETION = Body(
  'CompletionRequest',
  (
    *_SHARED,
    Field('prompt', _PROMPT, 'What to continue.', required=True),
    Field(
      'max_tokens',
      _integer(0, 2**31 - 1),
      'Tokens to generate at most; 0 only with `echo`.',
      default=16,
    ),
    Field(
      'logprobs',
      _integer(0, 1000),
      'Return log-probabilities, and those of this many likeliest tokens.',
      'logprobs',
    ),
    Field('echo', _BOOLEAN, 'Return the prompt too.', default=False),
    _unsupported('best_of', 1),
    _unsupported('suffix'),
  ),
)

CHAT = Body(
  'ChatCompletionRequest',
  (
    *_SHARED,
    _MESSAGES,
    *_TEMPLATE_FIELDS,
    Field(
      'max_completion_tokens',
      _integer(1, 2**31 - 1),
      'Tokens to generate at most; the context’s length by default.',
    ),
    Field(
      'max_tokens',
      _integer(1, 2**31 - 1),
      'The older name of `max_completion_tokens`.',
    ),
    Field('logprobs', _BOOLEAN, 'Return log-probabilities.', default=False),
    Field(
      'top_logprobs',
      _integer(0, 1000),
      'And those of this many likeliest tokens. Needs `logprobs`.',
    ),
    _unsupported('audio'),
    _unsupported('function_call', 'none'),
    _unsupported('functions', []),
    _unsupported('metadata', {}),
    _unsupported('modalities', ['text']),
    _unsupported('parallel_tool_calls'),
    _unsupported('prediction'),
    _unsupported('prompt_cache_key'),
    _unsupported('reasoning_effort'),
    _unsupported('safety_identifier'),
    _unsupported('service_tier', 'auto', 'default'),
    _unsupported('store', False),
    _unsupported('tool_choice', 'none'),
    _unsupported('tools', []),
    _unsupported('verbosity'),
    _unsupported('web_search_options'),
  ),
)

TOKENIZE = Body(
  'TokenizeRequest',
  (
    dataclasses.replace(_MODEL, required=False),
    Field('prompt', _STRING, 'A text.'),
    dataclasses.replace(_MESSAGES, required=False),
    *_TEMPLATE_FIELDS,
    Field(
      'add_special_tokens',
      _BOOLEAN,
      'Put in front of `prompt` what starts a text.',
      default=True,
    ),
  ),
)

DETOKENIZE = Body(
  'DetokenizeRequest',
  (
    dataclasses.replace(_MODEL, required=False),
    Field('tokens', _list(_TOKEN), 'Token ids.', required=True),
  ),
)
