"""What a request may ask for, through the whole engine."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.sampling_params import SamplingParams
from jaxtrain.checkpoints.tokenizer import ByteTokenizer
from jaxtrain.models.transformer import Transformer
from jaxtrain.models.transformer import taps

_GREEDY = SamplingParams(max_tokens=10, temperature=0)
_PROMPT = tuple(b'a prompt of some pages')


@pytest.fixture
def engine(tiny, small_engine, small_runner):
  return tiny.engine(small_runner, small_engine, tokenizer=ByteTokenizer())


def _run(engine, prompts, params):
  ids = [engine.add_request(p, s) for p, s in zip(prompts, params, strict=True)]
  done = {}
  while engine.num_unfinished:
    done |= {out.request_id: out for out in engine.step()}
  return [done[i] for i in ids]


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(logit_bias={264: 1.0}), r'logit_bias \[264\] are not in 0..263'),
    (dict(logit_bias={i: 1.0 for i in range(33)}), 'max_logit_bias=32'),
    (dict(allowed_token_ids=[-1]), r'allowed_token_ids \[-1\]'),
    (dict(bad_token_ids=[300]), r'bad_token_ids \[300\]'),
    (dict(prompt_logprobs=6), 'prompt_logprobs=6 is above max_logprobs=5'),
    (dict(taps=('layers.0.output',)), r"taps \['layers.0.output'\]"),
    (dict(regex='('), "regex='\\('"),
    (dict(json_schema={'type': 'thing'}), 'json_schema='),
    (
      dict(min_tokens=3, stop_token_ids=range(20)),
      'min_tokens with 2. stop tokens',
    ),
  ],
)
def test_what_cannot_be_done_is_refused_by_name(engine, kwargs, message):
  with pytest.raises(ValueError, match=f'request 0: .*{message}'):
    engine.add_request([1], SamplingParams(**kwargs))
  assert engine.num_unfinished == 0


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(n=0), 'n=0 must be at least 1'),
    (dict(presence_penalty=3), r'presence_penalty=3 must be in \[-2, 2\]'),
    (dict(repetition_penalty=0), 'repetition_penalty=0'),
    (dict(logit_bias={3: float('inf')}), 'logit_bias=.* finite'),
    (dict(allowed_token_ids=[]), r'allowed_token_ids=\[\] must be not empty'),
    (dict(min_tokens=65), 'at most max_tokens=64'),
    (dict(json_schema='{}', regex='a'), 'cannot both be given'),
    (dict(prompt_logprobs=-1), 'prompt_logprobs=-1'),
  ],
)
def test_bad_params(kwargs, message):
  with pytest.raises(ValueError, match=message):
    SamplingParams(**kwargs)


def test_prompt_logprobs_are_those_of_a_full_forward(engine, tiny):
  asks = dataclasses.replace(_GREEDY, prompt_logprobs=2, logprobs=1)
  # Twice, as what is cached must not be skipped; and in company.
  outs = _run(
    engine,
    [_PROMPT, _PROMPT, _PROMPT[:1], _PROMPT],
    [asks, _GREEDY, asks, asks],
  )
  assert outs[1].prompt_logprobs is None
  assert outs[2].prompt_logprobs == ()
  expected = np.asarray(jax.nn.log_softmax(tiny.logits(_PROMPT), axis=-1))
  for out in (outs[0], outs[3]):
    assert len(out.prompt_logprobs) == len(_PROMPT) - 1
    for i, lp in enumerate(out.prompt_logprobs):
      assert lp.token_id == _PROMPT[i + 1]
      np.testing.assert_allclose(
        lp.logprob, expected[i, _PROMPT[i + 1]], atol=1e-4
      )
      assert [t for t, _ in lp.top] == np.argsort(-expected[i])[:2].tolist()
    assert out.outputs[0].token_ids == tiny.greedy(_PROMPT, 10)


def test_prompt_logprobs_of_a_request_that_ends_at_once(engine):
  asks = dataclasses.replace(_GREEDY, max_tokens=1, prompt_logprobs=0)
  for length in (2, 4, 22):
    [out] = _run(engine, [_PROMPT[:length]], [asks])
    assert len(out.prompt_logprobs) == length - 1


def test_prompt_logprobs_survive_preemption(tiny, small_engine, small_runner):
  engine = tiny.engine(small_runner, small_engine, num_pages=14)
  asks = dataclasses.replace(_GREEDY, prompt_logprobs=0)
  prompts = [tuple((i + 9 * j) % 256 for j in range(30)) for i in range(5)]
  outs = _run(engine, prompts, [asks] * 5)
  assert engine.metrics.num_preemptions > 0
  for prompt, out in zip(prompts, outs, strict=True):
    logprobs = np.asarray(jax.nn.log_softmax(tiny.logits(prompt), axis=-1))
    expected = [logprobs[i, t] for i, t in enumerate(prompt[1:])]
    np.testing.assert_allclose(
      [lp.logprob for lp in out.prompt_logprobs], expected, atol=1e-4
    )


def test_grammars_hold_under_concurrency(engine):
  digits = SamplingParams(
    max_tokens=20, temperature=1.5, seed=1, regex='[0-9]{3}-[0-9]{2}'
  )
  letters = dataclasses.replace(digits, regex='(ab|cd){2,6}', n=2)
  plain = dataclasses.replace(_GREEDY, temperature=1.0, seed=3)
  schema = SamplingParams(
    max_tokens=60,
    temperature=1.0,
    seed=5,
    json_schema={
      'type': 'object',
      'properties': {'a': {'type': 'boolean'}, 'b': {'enum': [1, 22]}},
      'required': ['a', 'b'],
      'additionalProperties': False,
    },
  )
  params = [digits, plain, letters, schema, digits]
  outs = _run(engine, [_PROMPT] * 5, params)
  assert re.fullmatch('[0-9]{3}-[0-9]{2}', outs[0].text)
  assert outs[4].text == outs[0].text
  for c in outs[2].outputs:
    assert re.fullmatch('(ab|cd){2,6}', c.text)
  assert outs[2].outputs[0].text != outs[2].outputs[1].text
  value = re.sub(r'\s', '', outs[3].text)
  assert re.fullmatch(r'\{"a":(true|false),"b":(1|22)\}', value)
  assert all(
    c.finish_reason == 'stop'
    for o in outs
    for c in o.outputs
    if o is not outs[1]
  )
  [alone] = _run(engine, [_PROMPT], [plain])
  assert alone.outputs == outs[1].outputs


def test_allowed_bad_and_minimum(engine):
  only = dataclasses.replace(_GREEDY, allowed_token_ids=[5, 6, 7], max_tokens=6)
  [free] = _run(engine, [_PROMPT], [_GREEDY])
  bad = dataclasses.replace(
    _GREEDY, bad_token_ids=free.outputs[0].token_ids[:1]
  )
  stop = dataclasses.replace(
    _GREEDY, stop_token_ids=free.outputs[0].token_ids[:1], min_tokens=4
  )
  a, b, c = _run(engine, [_PROMPT] * 3, [only, bad, stop])
  assert set(a.outputs[0].token_ids) <= {5, 6, 7}
  assert free.outputs[0].token_ids[0] not in b.outputs[0].token_ids
  assert len(c.outputs[0].token_ids) >= 4
  assert free.outputs[0].token_ids[0] not in c.outputs[0].token_ids[:4]


def test_stop_texts_are_held_back_while_streaming(engine):
  [whole] = _run(engine, [_PROMPT], [_GREEDY])
  params = SamplingParams(
    max_tokens=12, temperature=0, allowed_token_ids=list(b'xyz'), stop=('zz',)
  )
  pieces = []
  engine.add_request(_PROMPT, params, sink=lambda d: pieces.append(d))
  done = []
  while engine.num_unfinished:
    done += engine.step()
  [out] = done
  assert ''.join(d.text for d in pieces) == out.text
  assert pieces[-1].output == out and pieces[-1].finish_reason is not None
  assert all(d.finish_reason is None for d in pieces[:-1])
  assert whole.outputs[0].finish_reason == 'length'


def test_taps_are_the_hidden_states_of_a_dense_forward(tiny, small_engine):
  names = ('layers.1.output', 'embeddings')
  config = dataclasses.replace(small_engine, taps=(*names, 'final_norm'))
  engine = tiny.engine(tiny.runner(config), config, num_pages=16)
  asks = dataclasses.replace(_GREEDY, taps=names)
  prompts = [_PROMPT, _PROMPT[::-1], _PROMPT[:9], _PROMPT]
  outs = _run(engine, prompts, [asks, _GREEDY, asks, asks])
  assert outs[1].outputs[0].taps is None
  model = Transformer(tiny.config)
  for prompt, out in zip(prompts, outs, strict=True):
    tokens = out.outputs[0].token_ids
    assert tokens == tiny.greedy(prompt, 10)
    if out.outputs[0].taps is None:
      continue
    # The last token is returned and never computed.
    ids = [*prompt, *tokens[:-1]]
    _, variables = model.apply(
      {'params': tiny.params}, jnp.array([ids]), mutable=['intermediates']
    )
    expected = taps(variables['intermediates'], names)
    for name, x in zip(names, expected, strict=True):
      np.testing.assert_allclose(
        out.outputs[0].taps[name], x[0], rtol=1e-4, atol=1e-4
      )


def test_a_large_bucket_may_come_later(tiny, small_engine):
  config = dataclasses.replace(
    small_engine, background_compile=True, prefix_cache=False
  )
  runner = tiny.runner(config)
  engine = tiny.engine(runner, config)
  prompts = [_PROMPT, _PROMPT[5:], _PROMPT[:3]]
  for _ in range(2):
    outs = _run(engine, prompts, [_GREEDY] * 3)
    for prompt, out in zip(prompts, outs, strict=True):
      assert out.outputs[0].token_ids == tiny.greedy(prompt, 10)
    runner._programs.wait()
  assert runner.max_ready_tokens == 24
  assert max(s.bucket for s in engine.metrics.steps) == 24


def test_the_output_is_sent_once(engine):
  deltas = []
  params = dataclasses.replace(_GREEDY, temperature=1.0, seed=1, n=4)
  engine.add_request(_PROMPT, params, sink=deltas.append)
  while engine.num_unfinished:
    engine.step()
  assert [d.output is not None for d in deltas] == [False] * (
    len(deltas) - 1
  ) + [True]
  assert sum(len(d.token_ids) for d in deltas) == 40


def test_an_end_with_a_step_in_flight_is_sent_once(engine):
  [free] = _run(engine, [_PROMPT], [_GREEDY])
  stop = dataclasses.replace(
    _GREEDY, stop_token_ids=free.outputs[0].token_ids[2:3]
  )
  ends = collections.Counter()

  def sink(delta):
    ends[delta.request_id] += delta.output is not None

  ids = [engine.add_request(_PROMPT, p, sink=sink) for p in (stop, _GREEDY)]
  while engine.num_unfinished:
    engine.step()
  assert ends == dict.fromkeys(ids, 1)


def test_shared_pages_are_counted_once(tiny, small_runner, small_engine):
  engine = tiny.engine(small_runner, small_engine, num_pages=12)
  prompt = list(range(1, 33))  # Eight pages; two of these requests fill 16.
  params = SamplingParams(max_tokens=8, temperature=0)
  first = engine.add_request(prompt, params)
  done = {out.request_id: out for _ in range(3) for out in engine.step()}
  assert not done
  second = engine.add_request(prompt, params)
  while engine.num_unfinished:
    done |= {out.request_id: out for out in engine.step()}
  assert max(s.num_running for s in engine.metrics.steps) == 2
  expected = tiny.greedy(prompt, 8)
  for i in (first, second):
    assert done[i].outputs[0].token_ids == expected
