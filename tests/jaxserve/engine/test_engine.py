"""What the engine refuses, returns, counts and never compiles."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.sampling_params import SamplingParams
from jaxtrain.checkpoints.tokenizer import ByteTokenizer

_GREEDY = SamplingParams(max_tokens=10, temperature=0)


def _run(engine, prompts, params):
  params = params if isinstance(params, list) else [params] * len(prompts)
  ids = [engine.add_request(p, s) for p, s in zip(prompts, params, strict=True)]
  done = {}
  while engine.num_unfinished:
    done |= {out.request_id: out for out in engine.step()}
  return [done[i] for i in ids]


@pytest.fixture
def engine(tiny, small_engine, small_runner):
  return tiny.engine(small_runner, small_engine, tokenizer=ByteTokenizer())


def test_refuses_what_it_cannot_run(engine, tiny, small_engine, small_runner):
  with pytest.raises(ValueError, match='prompt is empty'):
    engine.add_request('', _GREEDY)
  with pytest.raises(ValueError, match='prompt is empty'):
    engine.add_request([], _GREEDY)
  with pytest.raises(ValueError, match='has 96 tokens, .* at most 96'):
    engine.add_request([1] * 96, _GREEDY)
  with pytest.raises(ValueError, match=r'token ids \[264\] are not in 0..263'):
    engine.add_request([5, 264], _GREEDY)
  with pytest.raises(ValueError, match='logprobs=9 is above max_logprobs=5'):
    engine.add_request([1], dataclasses.replace(_GREEDY, logprobs=9))
  small = tiny.engine(small_runner, small_engine, num_pages=5)
  small.add_request([1] * 11, _GREEDY)  # 20 slots: just fits.
  with pytest.raises(ValueError, match='request 1: it can never fit.* 6 pages'):
    small.add_request([1] * 12, _GREEDY)
  with pytest.raises(ValueError, match='needs a tokenizer'):
    small.add_request('text', _GREEDY)
  assert engine.num_unfinished == 0 and small.num_unfinished == 1


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(temperature=-1), 'temperature=-1 must be finite and not negative'),
    (dict(temperature=float('nan')), 'temperature=nan'),
    (dict(top_p=0), r'top_p=0 must be in \(0, 1\]'),
    (dict(top_k=-2), 'top_k=-2'),
    (dict(min_p=2), 'min_p=2'),
    (dict(max_tokens=0), 'max_tokens=0 must be at least 1'),
    (dict(stop=['a', '']), 'stop='),
  ],
)
def test_refuses_bad_sampling_params(kwargs, message):
  with pytest.raises(ValueError, match=message):
    SamplingParams(**kwargs)


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (dict(page_size=0), 'page_size=0 must be at least 1'),
    (dict(max_step_tokens=8), 'max_step_tokens=8 must be at least'),
    (dict(token_buckets=(8, 64)), r'token_buckets=\(8, 64\)'),
    (dict(token_buckets=()), r'token_buckets=\(\)'),
  ],
)
def test_refuses_bad_sizes(kwargs, message):
  with pytest.raises(ValueError, match=message):
    EngineConfig(**kwargs)


def test_context_length_ends_a_request(engine):
  [out] = _run(
    engine, [[3] * 90], dataclasses.replace(_GREEDY, max_tokens=None)
  )
  assert len(out.outputs[0].token_ids) == 6
  assert out.outputs[0].finish_reason == 'length'


def test_stop_tokens_and_texts(engine, tiny):
  prompt = list(b'stop me')
  tokens = tiny.greedy(prompt, 10)
  [plain] = _run(engine, [prompt], _GREEDY)
  assert plain.outputs[0].token_ids == tokens
  assert plain.outputs[0].finish_reason == 'length'
  assert plain.text == ByteTokenizer().decode(tokens)

  stop_id = tokens[4]
  end = tokens.index(stop_id)
  by_id = dataclasses.replace(_GREEDY, stop_token_ids=(stop_id,))
  [out] = _run(engine, [prompt], by_id)
  assert out.outputs[0].token_ids == tokens[:end]
  assert out.outputs[0].finish_reason == 'stop'


class _Letters(ByteTokenizer):
  """Every id is some letter, so that any output is text."""

  def decode(self, ids):
    return ''.join(chr(ord('a') + i % 26) for i in ids)


def test_stop_text_may_span_tokens(tiny, small_engine, small_runner):
  tokenizer = _Letters()
  prompt = list(b'stop me')
  text = tokenizer.decode(tiny.greedy(prompt, 10))
  # The incremental decoder knows bytes; go through the general path.
  engine = tiny.engine(
    small_runner, small_engine, tokenizer=_General(tokenizer)
  )
  stop = text[3:6]
  params = dataclasses.replace(_GREEDY, stop=('never there', stop))
  [out] = _run(engine, [prompt], params)
  assert out.text == text[: text.index(stop)]
  assert out.outputs[0].finish_reason == 'stop'


class _General:
  """A tokenizer that is not a ByteTokenizer."""

  def __init__(self, inner):
    self._inner = inner
    self.stop_ids = ()

  def encode(self, text, add_bos=False):
    return self._inner.encode(text, add_bos)

  def decode(self, ids):
    return self._inner.decode(ids)


def test_logprobs_are_those_of_a_full_forward(engine, tiny):
  prompt = [9, 8, 7]
  params = [
    dataclasses.replace(_GREEDY, logprobs=3),
    dataclasses.replace(_GREEDY, temperature=1.5, seed=3, logprobs=0),
    _GREEDY,
  ]
  top, drawn, without = _run(engine, [prompt] * 3, params)
  assert without.outputs[0].logprobs is None
  for out, n in ((top, 3), (drawn, 0)):
    tokens = out.outputs[0].token_ids
    logits = tiny.logits(prompt + list(tokens))
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert len(out.outputs[0].logprobs) == len(tokens)
    for i, lp in enumerate(out.outputs[0].logprobs):
      row = expected[len(prompt) - 1 + i]
      assert lp.token_id == tokens[i] and len(lp.top) == n
      np.testing.assert_allclose(lp.logprob, row[tokens[i]], atol=1e-4)
      best = np.argsort(-row)[:n]
      assert [t for t, _ in lp.top] == best.tolist()
      np.testing.assert_allclose([p for _, p in lp.top], row[best], atol=1e-4)


def test_a_seed_means_the_same_tokens_in_any_company(engine):
  seeded = SamplingParams(max_tokens=12, temperature=2.0, seed=11, top_k=50)
  [alone] = _run(engine, [[1, 2, 3]], seeded)
  noise = [SamplingParams(max_tokens=9, temperature=1.0) for _ in range(5)]
  crowd = _run(
    engine,
    [[5] * 20, [1, 2, 3], [7] * 30, [8], [1, 2], [4] * 9],
    [noise[0], seeded, *noise[1:]],
  )
  assert crowd[1].outputs == alone.outputs
  other = dataclasses.replace(seeded, seed=12)
  assert _run(engine, [[1, 2, 3]], other)[0].outputs != alone.outputs


def test_unseeded_requests_differ(engine):
  hot = SamplingParams(max_tokens=12, temperature=3.0)
  a, b = _run(engine, [[1, 2, 3]] * 2, hot)
  assert a.outputs[0].token_ids != b.outputs[0].token_ids


def test_abort_frees_everything(engine):
  first = engine.add_request([1] * 50, _GREEDY)
  second = engine.add_request([2] * 5, _GREEDY)
  for _ in range(3):
    engine.step()
  engine.abort(first)
  done = {}
  while engine.num_unfinished:
    done |= {out.request_id: out for out in engine.step()}
  assert done[first].outputs[0].finish_reason == 'abort'
  assert done[second].outputs[0].finish_reason == 'length'
  assert engine.num_held_pages == 0
  assert len(engine._free_rows) == 4


def test_forgotten_requests_leave_nothing(engine, tiny):
  ids = [engine.add_request([i] * 30, _GREEDY) for i in range(6)]
  other = engine.add_request([7, 7, 7], _GREEDY)
  for _ in range(4):
    engine.step()
  engine.forget([*ids, 10**6])
  assert engine.num_unfinished == 1
  done = []
  while engine.num_unfinished:
    done += engine.step()
  assert [out.request_id for out in done] == [other]
  assert done[0].outputs[0].token_ids == tiny.greedy([7, 7, 7], 10)
  assert engine.num_held_pages == 0


def test_nothing_compiles_after_warm_up(engine, small_runner):
  assert small_runner.num_programs == 2
  _run(engine, [[1]], _GREEDY)  # Host-side helpers of the first call.
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: 'compile' in name and compiled.append(name)
  )
  mixed = [
    _GREEDY,
    SamplingParams(temperature=1.0, top_p=0.5, logprobs=2, max_tokens=20),
    SamplingParams(temperature=0.5, top_k=3, min_p=0.1, seed=1),
  ]
  for n in (1, 2, 5, 9):
    prompts = [[i + 1] * (1 + 11 * i % 30) for i in range(n)]
    _run(engine, prompts, [mixed[i % 3] for i in range(n)])
  assert compiled == []
  jax.jit(lambda x: x + 1.5)(np.float32(n))  # The listener does listen.
  assert compiled != []
