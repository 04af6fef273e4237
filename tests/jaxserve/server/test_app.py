"""OpenAI's own client against a real server: every endpoint, every option."""

import asyncio
import json
import math

import numpy as np
import pytest

from jaxserve import SamplingParams

_HELLO = [{'role': 'user', 'content': 'hello'}]
_GREEDY = {'model': 'tiny', 'temperature': 0, 'max_tokens': 8}


@pytest.fixture(scope='module')
def greedy(tiny, llm):
  """What follows a text, by a forward without cache or engine."""

  def greedy(text, count=8):
    return tiny.greedy(llm.tokenizer.encode(text, add_bos=True), count)

  return greedy


def _text(llm, tokens):
  return llm.tokenizer.decode(tokens)


def test_completion(client, greedy, llm):
  out = client.completions.create(
    prompt='hello', extra_body={'return_token_ids': True}, **_GREEDY
  )
  [choice] = out.choices
  tokens = greedy('hello')
  assert choice.text == _text(llm, tokens)
  assert tuple(choice.token_ids) == tokens
  assert (choice.index, choice.finish_reason) == (0, 'length')
  assert choice.logprobs is None
  assert (out.object, out.model) == ('text_completion', 'tiny')
  # One for the token that starts a text.
  assert out.usage.prompt_tokens == 6
  assert out.usage.completion_tokens == 8
  assert out.usage.total_tokens == 14


def test_prompts_of_every_form(client, greedy, llm):
  ids = llm.tokenizer.encode('hello', add_bos=True)
  more = llm.tokenizer.encode('more', add_bos=True)
  texts = {
    'hello': _text(llm, greedy('hello')),
    'more': _text(llm, greedy('more')),
  }
  for prompt, expected in (
    ('hello', ['hello']),
    (ids, ['hello']),
    (['hello', 'more'], ['hello', 'more']),
    ([more, ids], ['more', 'hello']),
  ):
    out = client.completions.create(prompt=prompt, **_GREEDY)
    assert [c.text for c in out.choices] == [texts[name] for name in expected]
    assert [c.index for c in out.choices] == list(range(len(expected)))


def test_a_stream_is_what_is_returned(client):
  args = dict(prompt=['hello', 'more'], n=2, seed=3, max_tokens=12, logprobs=2)
  args |= dict(model='tiny', extra_body={'return_token_ids': True})
  whole = client.completions.create(**args)
  stream = client.completions.create(
    stream=True, stream_options={'include_usage': True}, **args
  )
  texts, tokens, reasons, logprobs = {}, {}, {}, {}
  *chunks, last = stream
  for chunk in chunks:
    assert chunk.usage is None and chunk.id == last.id
    [c] = chunk.choices
    texts[c.index] = texts.get(c.index, '') + c.text
    tokens[c.index] = tokens.get(c.index, []) + c.token_ids
    if c.finish_reason is not None:
      assert c.index not in reasons
      reasons[c.index] = c.finish_reason
    if c.logprobs is not None:
      known = logprobs.setdefault(c.index, {})
      for name, values in c.logprobs.model_dump().items():
        known[name] = known.get(name, []) + values
  assert last.choices == [] and last.usage.completion_tokens == 48
  for c in whole.choices:
    assert texts[c.index] == c.text
    assert tokens[c.index] == c.token_ids
    assert reasons[c.index] == c.finish_reason
    assert logprobs[c.index]['tokens'] == c.logprobs.tokens
    assert logprobs[c.index]['text_offset'] == c.logprobs.text_offset
    np.testing.assert_allclose(
      logprobs[c.index]['token_logprobs'], c.logprobs.token_logprobs, atol=1e-5
    )
  assert len(texts) == len(set(map(tuple, tokens.values()))) == 4


def _log_softmax(x):
  x = x.astype(np.float64) - x.max()
  return x - math.log(np.exp(x).sum())


def test_logprobs_of_a_completion(client, tiny, llm, greedy):
  out = client.completions.create(
    prompt='hello',
    logprobs=3,
    extra_body={'return_token_ids': True, 'allowed_token_ids': list(b'abcde')},
    **_GREEDY,
  )
  lp, tokens = out.choices[0].logprobs, out.choices[0].token_ids
  prompt = llm.tokenizer.encode('hello', add_bos=True)
  logits = tiny.logits(prompt + tokens)[len(prompt) - 1 :]
  assert ''.join(lp.tokens) == out.choices[0].text
  assert lp.text_offset == list(range(8))
  for i, token in enumerate(tokens):
    expected = _log_softmax(logits[i])
    assert lp.token_logprobs[i] == pytest.approx(expected[token], abs=1e-4)
    best = sorted(np.sort(expected)[-3:].tolist() + [expected[token]])
    got = sorted(lp.top_logprobs[i].values())
    np.testing.assert_allclose(got, best, atol=1e-4)
    assert lp.top_logprobs[i][lp.tokens[i]] == lp.token_logprobs[i]


def test_logprobs_of_a_chat(client, llm):
  out = client.chat.completions.create(
    messages=_HELLO,
    logprobs=True,
    top_logprobs=2,
    extra_body={'allowed_token_ids': list('aé'.encode())},
    **_GREEDY,
  )
  [choice] = out.choices
  assert len(choice.logprobs.content) == 8
  for entry in choice.logprobs.content:
    # Halves of a character are no text; the client still learns which.
    if entry.bytes is None:
      assert entry.token in ('token_id:195', 'token_id:169')
    else:
      assert (entry.token, entry.bytes) == ('a', [97])
    assert len(entry.top_logprobs) == 2
    assert entry.top_logprobs[0].logprob >= entry.logprob


def test_echo_scores_the_prompt(client, tiny, llm):
  out = client.completions.create(
    model='tiny', prompt='hello', max_tokens=0, echo=True, logprobs=1
  )
  [choice] = out.choices
  assert choice.text == 'hello'
  assert out.usage.completion_tokens == 0
  prompt = llm.tokenizer.encode('hello', add_bos=True)
  lp = choice.logprobs
  assert lp.tokens == [f'token_id:{prompt[0]}', *'hello']
  assert lp.token_logprobs[0] is lp.top_logprobs[0] is None
  logits = tiny.logits(prompt)
  expected = [_log_softmax(logits[i])[t] for i, t in enumerate(prompt[1:])]
  np.testing.assert_allclose(lp.token_logprobs[1:], expected, atol=1e-4)


def test_stops(client, greedy, llm):
  allowed = {'allowed_token_ids': list(b'abcdefgh'), 'return_token_ids': True}
  args = _GREEDY | dict(prompt='hello', extra_body=allowed)
  text = client.completions.create(**args).choices[0].text
  stop = text[3:5]
  for value in (stop, ['zz', stop]):
    [choice] = client.completions.create(stop=value, **args).choices
    assert choice.finish_reason == 'stop'
    assert choice.text == text[: text.index(stop)]
    chunks = client.completions.create(stop=value, stream=True, **args)
    streamed = [c.choices[0] for c in chunks]
    assert ''.join(c.text for c in streamed) == choice.text
    assert streamed[-1].finish_reason == 'stop'
  args['extra_body'] = allowed | {'stop_token_ids': [ord(text[4])]}
  [choice] = client.completions.create(**args).choices
  assert choice.text == text[: text.index(text[4])]


def test_seeds_repeat_and_differ(client):
  args = dict(model='tiny', prompt='hello', max_tokens=12)
  text = lambda **kwargs: (
    client.completions.create(**args, **kwargs).choices[0].text
  )
  assert text(seed=1) == text(seed=1) != text(seed=2)
  assert text() != text()


def test_parameters_reach_the_engine(client, llm, engine):
  """Each with a value that shows in the tokens, by the same in process."""
  body = dict(
    prompt='hello hello',
    max_tokens=12,
    temperature=0.9,
    top_p=0.95,
    seed=5,
    n=2,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    logit_bias={'104': 4, '101': -100},
    stop=['\x00'],
  )
  ours = dict(
    top_k=100,
    min_p=0.001,
    repetition_penalty=1.1,
    min_tokens=3,
    ignore_eos=True,
    bad_token_ids=[7, 8],
    stop_token_ids=[9],
    priority=2,
    return_token_ids=True,
  )
  out = client.completions.create(
    model='tiny', user='me', extra_body=ours, **body
  )
  params = {**body, **ours}
  for name in ('prompt', 'priority', 'return_token_ids'):
    del params[name]
  params['logit_bias'] = {104: 4.0, 101: -100.0}
  seen = []

  def run(engine):
    engine.add_request('hello hello', SamplingParams(**params))
    while engine.num_unfinished:
      seen.extend(engine.step())

  asyncio.run(engine.call(run))
  [expected] = seen
  assert [tuple(c.token_ids) for c in out.choices] == [
    c.token_ids for c in expected.outputs
  ]


def test_chat(client, greedy, llm, tiny):
  messages = [
    {'role': 'system', 'content': 'be kind'},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'hel'},
                                 {'type': 'text', 'text': 'lo'}]},
  ]  # fmt: skip
  prompt = llm.tokenizer.encode('s:be kind\nu:hello\na:')
  expected = _text(llm, tiny.greedy(prompt, 8))
  out = client.chat.completions.create(messages=messages, **_GREEDY)
  [choice] = out.choices
  assert choice.message.content == expected
  assert choice.message.role == 'assistant'
  assert choice.finish_reason == 'length'
  assert out.usage.prompt_tokens == len(prompt)

  args = _GREEDY | {'max_completion_tokens': 8}
  del args['max_tokens']
  first, *chunks, last = client.chat.completions.create(
    messages=messages,
    stream=True,
    stream_options={'include_usage': True},
    **args,
  )
  assert first.choices[0].delta.role == 'assistant'
  assert ''.join(c.choices[0].delta.content or '' for c in chunks) == expected
  assert chunks[-1].choices[0].finish_reason == 'length'
  assert last.usage.total_tokens == out.usage.total_tokens
  # All but the page that is not full was there already.
  assert last.usage.prompt_tokens_details.cached_tokens >= 16


def test_variables_of_the_chat_template(client, llm, tiny):
  prompt = llm.tokenizer.encode('u:hello\nsad ')
  out = client.chat.completions.create(
    messages=_HELLO,
    extra_body={
      'add_generation_prompt': False,
      'chat_template_kwargs': {'mood': 'sad '},
    },
    **_GREEDY,
  )
  expected = _text(llm, tiny.greedy(prompt, 8))
  assert out.choices[0].message.content == expected


def test_json_by_schema(client):
  schema = {
    'type': 'object',
    'properties': {'a': {'type': 'integer', 'minimum': 10, 'maximum': 99}},
    'required': ['a'],
    'additionalProperties': False,
  }
  out = client.chat.completions.create(
    model='tiny',
    messages=_HELLO,
    max_tokens=40,
    seed=2,
    response_format={
      'type': 'json_schema',
      'json_schema': {'name': 'x', 'schema': schema, 'strict': True},
    },
  )
  assert out.choices[0].finish_reason == 'stop'
  assert 10 <= json.loads(out.choices[0].message.content)['a'] <= 99
  out = client.completions.create(
    model='tiny',
    prompt='hello',
    max_tokens=40,
    seed=1,
    extra_body={'regex': '[ab]{5}c'},
  )
  assert out.choices[0].text.strip('ab') == 'c'


def test_models(client):
  [model] = client.models.list()
  assert model.id == 'tiny'
  assert client.models.retrieve('tiny') == model
  assert model.max_model_len > 0


def test_tokens_and_back(client, llm):
  post = lambda path, **body: client.post(
    str(client.base_url.copy_with(path=path)), body=body, cast_to=object
  )
  tokens = llm.tokenizer.encode('héllo', add_bos=True)
  assert post('/tokenize', model='tiny', prompt='héllo') == {
    'tokens': tokens,
    'count': 7,
  }
  bare = post('/tokenize', prompt='héllo', add_special_tokens=False)
  assert bare['tokens'] == tokens[1:]
  chat = post('/tokenize', messages=_HELLO)
  assert chat['tokens'] == llm.tokenizer.encode('u:hello\na:')
  assert post('/detokenize', tokens=tokens) == {'prompt': 'héllo'}
