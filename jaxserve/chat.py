"""Conversations to text, by the template that comes with a model.

The templates are Jinja, with the few additions of `transformers` that published
ones rely on: https://huggingface.co/docs/transformers/chat_templating. They run
in Jinja's sandbox and cannot change what they are given.
"""

from collections.abc import Mapping, Sequence
import datetime
import json
import os
import pathlib
from typing import Any

import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import sandbox

from jaxtrain.checkpoints.gguf_file import open_gguf
from jaxtrain.checkpoints.tokenizer import Tokenizer

Message = Mapping[str, Any]

_SUFFIXES = ('.jinja', '.jinja2', '.j2', '.txt')
_SPECIAL_TOKENS = (
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
)


class _Generation(ext.Extension):
  """`{% generation %}`, which marks for training what the model said."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body, lineno=line)


class ChatTemplate:
  """Turns messages into the text, or the tokens, that a model was trained on.

  Args:
    source: The template.
    tokenizer: For `token_ids`.
    special_tokens: Texts that the template may use, such as 'bos_token'.

  Raises:
    ValueError: It is not a template.
  """

  def __init__(
    self,
    source: str,
    tokenizer: Tokenizer | None = None,
    special_tokens: Mapping[str, str] | None = None,
  ):
    self._tokenizer = tokenizer
    self._special_tokens = dict(special_tokens or {})
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, ext.loopcontrols],
    )
    environment.filters['tojson'] = _to_json
    environment.globals['raise_exception'] = _raise
    environment.globals['strftime_now'] = lambda form: (
      datetime.datetime.now().strftime(form)
    )
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as e:
      raise ValueError(f'the chat template is not valid: {e}') from e

  def render(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
  ) -> str:
    """The text of a conversation.

    Args:
      messages: `{'role': ..., 'content': ...}` and what else the template
        reads. Contents are texts, or lists of `{'type': 'text', 'text': ...}`.
      add_generation_prompt: End with what starts an answer.
      tools: Functions the model may call, as JSON schemas.
      variables: Others of this template, such as `enable_thinking`.

    Raises:
      ValueError: No messages, or not of this form, or the template refuses
        them.
    """
    values = self._special_tokens | dict(variables or {})
    values |= dict(
      messages=_plain(messages),
      tools=tools,
      add_generation_prompt=add_generation_prompt,
    )
    try:
      return self._template.render(values)
    # Templates run into errors of every kind on messages they do not expect.
    except Exception as e:
      raise ValueError(f'the chat template refuses the messages: {e}') from e

  def token_ids(self, messages: Sequence[Message], **kwargs: Any) -> list[int]:
    """Tokens of `render`; its own special tokens are the only ones."""
    return self._tokenizer.encode(self.render(messages, **kwargs))


def load_chat_template(
  path: str | os.PathLike, tokenizer: Tokenizer | None = None
) -> ChatTemplate | None:
  """Finds the template of a model.

  Args:
    path: A file that is a template (.jinja); a GGUF file; or a model's
      directory, with `chat_template.jinja` or a `chat_template` in
      `tokenizer_config.json`, or a file in it.
    tokenizer: For `ChatTemplate.token_ids`.

  Returns:
    The template, or `None` if there is none.

  Raises:
    ValueError: There is no such file, or it is not a template.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise ValueError(f'no chat template at {str(path)!r}')
  if path.suffix == '.gguf':
    source, special = _read_gguf(path)
  else:
    folder = path if path.is_dir() else path.parent
    config = _read_json(folder / 'special_tokens_map.json')
    config |= _read_json(folder / 'tokenizer_config.json')
    special = {name: _token(config.get(name)) for name in _SPECIAL_TOKENS}
    source = config.get('chat_template')
    if isinstance(source, list):  # Several, with names.
      named = {item['name']: item['template'] for item in source}
      source = named.get('default')
    if (file := folder / 'chat_template.jinja').is_file():
      source = file.read_text('utf-8')
    if path.is_file() and path.suffix in _SUFFIXES:
      source = path.read_text('utf-8')
  if source is None:
    return None
  special = {name: token for name, token in special.items() if token}
  return ChatTemplate(source, tokenizer, special)


def _read_gguf(path):
  file = open_gguf(path)
  tokens = file.get('tokenizer.ggml.tokens') or []
  special = {}
  for role in ('bos', 'eos', 'unknown', 'padding'):
    i = file.get(f'tokenizer.ggml.{role}_token_id')
    name = {'unknown': 'unk', 'padding': 'pad'}.get(role, role)
    special[f'{name}_token'] = None if i is None else tokens[i]
  return file.get('tokenizer.chat_template'), special


def _plain(messages):
  """Messages whose contents are texts: the form that every template takes."""
  if not messages:
    raise ValueError('there are no messages')
  return [{**m, 'content': _text(m.get('content'))} for m in messages]


def _text(content):
  if content is None or isinstance(content, str):
    return content
  for part in content:
    if part.get('type') != 'text' or not isinstance(part.get('text'), str):
      raise ValueError(
        f'content {part!r:.80} is not supported; only '
        "{'type': 'text', 'text': ...} is"
      )
  return ''.join(part['text'] for part in content)


def _to_json(x, ensure_ascii=False, indent=None, separators=None, **kwargs):
  # Jinja's own filter escapes for HTML.
  return json.dumps(
    x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **kwargs
  )


def _token(value):
  return value.get('content') if isinstance(value, dict) else value


def _raise(message):
  raise jinja2.TemplateError(message)


def _read_json(path):
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text('utf-8'))
  except ValueError as e:
    raise ValueError(f'{path} is not JSON: {e}') from e
