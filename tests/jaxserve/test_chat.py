"""Chat templates as models publish them, written out by hand."""

import json

import pytest
from tokenizers import Tokenizer as HF
from tokenizers import models
from tokenizers import pre_tokenizers

from jaxserve.chat import ChatTemplate
from jaxserve.chat import load_chat_template
from jaxtrain.checkpoints.tokenizer import ByteTokenizer
from jaxtrain.checkpoints.tokenizer import HFTokenizer

_TALK = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': ' Hi <&> "you" '},
  {'role': 'assistant', 'content': 'Hello'},
  {'role': 'user', 'content': 'Bye'},
]
_CHATML = (
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
  "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of Llama 2, shortened: special tokens, strip(), namespace, loop, exceptions.
_LLAMA = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set ns = namespace(system='<<SYS>>' ~ messages[0]['content'] ~ '<</SYS>>') -%}
{%- set rest = messages[1:] -%}
{%- else -%}
{%- set ns = namespace(system='') -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate user/assistant') }}
{%- endif -%}
{%- if m['role'] == 'user' -%}
{{ bos_token + '[INST] ' + (ns.system if loop.first else '') + m['content'].strip() + ' [/INST]' }}
{%- else -%}
{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}"""  # noqa: E501
_LLAMA_TEXT = (
  '<s>[INST] <<SYS>>Be brief.<</SYS>>Hi <&> "you" [/INST] Hello </s>'
  '<s>[INST] Bye [/INST]'
)
_SPECIAL = {'bos_token': '<s>', 'eos_token': '</s>'}


def test_chatml():
  template = ChatTemplate(_CHATML)
  expected = (
    '<|im_start|>system\nBe brief.<|im_end|>\n'
    '<|im_start|>user\n Hi <&> "you" <|im_end|>\n'
    '<|im_start|>assistant\nHello<|im_end|>\n'
    '<|im_start|>user\nBye<|im_end|>\n'
  )
  start = '<|im_start|>assistant\n'
  assert template.render(_TALK) == expected + start
  assert template.render(_TALK, add_generation_prompt=False) == expected


def test_llama():
  template = ChatTemplate(_LLAMA, special_tokens=_SPECIAL)
  assert template.render(_TALK) == _LLAMA_TEXT
  with pytest.raises(ValueError, match='refuses .*: roles must alternate'):
    template.render(_TALK[:1] * 2)


def test_what_templates_are_given():
  tools = [{'name': 'f', 'parameters': {'π': '<>'}}]
  template = ChatTemplate(
    '{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ strftime_now("%Y") }}'
    '{%- for x in range(9) %}{% if x == 2 %}{% break %}{% endif %}{{ x }}'
    '{%- endfor %}{{ thinking }}{{ nothing is defined }}{{ tools is none }}'
  )
  text = template.render(_TALK, tools=tools, variables={'thinking': 'no'})
  compact, pretty = (
    json.dumps(tools, ensure_ascii=False),
    json.dumps(tools, ensure_ascii=False, indent=2),
  )
  assert text.startswith(compact + pretty + '20')
  assert text.endswith('01noFalseFalse')
  assert template.render(_TALK).endswith('FalseTrue')


def test_contents():
  template = ChatTemplate(
    '{% for m in messages %}[{{ m.content }}]{% endfor %}'
  )
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  talk = [{'role': 'user', 'content': parts}, {'role': 'assistant'}]
  assert template.render(talk) == '[ab][None]'
  assert talk[0]['content'] is parts
  for wrong in ([{'type': 'image_url'}], [{'type': 'text'}]):
    with pytest.raises(ValueError, match='content .* is not supported'):
      template.render([{'role': 'user', 'content': wrong}])
  with pytest.raises(ValueError, match='no messages'):
    template.render([])


@pytest.mark.parametrize(
  'source',
  [
    # Python's own objects are out of reach, and arguments cannot be changed.
    '{{ messages.__class__.__mro__ }}',
    '{{ "".__class__.__base__.__subclasses__() }}',
    '{{ messages.append(1) }}',
    '{{ messages[0].update({"role": "x"}) }}',
    '{{ messages[7].role }}',
    '{% include "/etc/hostname" %}',
  ],
)
def test_templates_run_in_a_sandbox(source):
  with pytest.raises(ValueError, match='the chat template refuses'):
    ChatTemplate(source).render([{'role': 'user', 'content': 'x'}])


def test_templates_that_are_none():
  with pytest.raises(ValueError, match='the chat template is not valid'):
    ChatTemplate('{% if %}')


def test_special_tokens_are_tokens_and_not_added_again():
  inner = HF(models.WordLevel({'<s>': 0, 'hi': 1, 'you': 2, '?': 3}, '?'))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  inner.add_special_tokens(['<s>'])
  tokenizer = HFTokenizer(inner, bos='<s>')
  template = ChatTemplate(
    '{{ bos_token }}{{ messages[0].content }}', tokenizer, _SPECIAL
  )
  talk = [{'role': 'user', 'content': 'hi you'}]
  assert template.token_ids(talk) == [0, 1, 2]


def test_bytes():
  template = ChatTemplate('{{ messages[0].content }}', ByteTokenizer())
  talk = [{'role': 'user', 'content': 'hé'}]
  assert template.token_ids(talk) == list('hé'.encode())


def _config(folder, **values):
  (folder / 'tokenizer_config.json').write_text(json.dumps(values))


def test_where_templates_are_found(tmp_path):
  assert load_chat_template(tmp_path) is None
  _config(tmp_path, bos_token='<s>', eos_token={'content': '</s>'})
  assert load_chat_template(tmp_path) is None

  def text(path=tmp_path):
    return load_chat_template(path).render(_TALK)

  special = json.dumps({'eos_token': '</s>', 'bos_token': 'older'})
  (tmp_path / 'special_tokens_map.json').write_text(special)
  _config(tmp_path, bos_token='<s>', chat_template=_LLAMA)
  assert text() == _LLAMA_TEXT
  (tmp_path / 'tokenizer.json').touch()
  assert text(tmp_path / 'tokenizer.json') == _LLAMA_TEXT
  named = [
    {'name': 'tool_use', 'template': 'tools'},
    {'name': 'default', 'template': 'default {{ bos_token }}'},
  ]
  _config(tmp_path, bos_token='<s>', chat_template=named)
  assert text() == 'default <s>'
  (tmp_path / 'chat_template.jinja').write_text('file {{ bos_token }}')
  assert text() == 'file <s>'
  (tmp_path / 'mine.jinja').write_text('mine {{ bos_token }}')
  assert text(tmp_path / 'mine.jinja') == 'mine <s>'
  (tmp_path / 'tokenizer_config.json').write_text('{')
  with pytest.raises(ValueError, match='tokenizer_config.json is not JSON'):
    load_chat_template(tmp_path)
  with pytest.raises(ValueError, match='no chat template at .*none.jinja'):
    load_chat_template(tmp_path / 'none.jinja')
