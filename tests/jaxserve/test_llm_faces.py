"""Streaming, chatting and serving a trainer's next parameters in a notebook."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxserve import LLM
from jaxserve import EngineConfig
from jaxserve import SamplingParams
from jaxserve.chat import ChatTemplate
from jaxserve.parity import logprob_parity
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Transformer

_CONFIG = ModelConfig(
  vocab_size=264,
  embed_dim=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=32,
  max_seq_len=96,
)
_ENGINE = EngineConfig(
  max_num_requests=4, page_size=4, max_step_tokens=16, token_buckets=(16,)
)
_PARAMS = SamplingParams(max_tokens=8, temperature=1.0, seed=2, logprobs=0)
_TEMPLATE = (
  '{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}'
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)


def _init(seed):
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(lambda k: nn.unbox(Transformer(_CONFIG).init(k, tokens)))
  return init(jax.random.key(seed))['params']


@pytest.fixture(scope='module')
def llm(tmp_path_factory):
  template = tmp_path_factory.mktemp('chat') / 'chat.jinja'
  template.write_text(_TEMPLATE)
  with LLM(
    _init(0),
    config=_CONFIG,
    tokenizer='byte',
    engine=_ENGINE,
    chat_template=template,
  ) as llm:
    yield llm


def test_streamed_equals_returned(llm):
  prompts = ['Hello', 'a longer prompt of some pages', 'x']
  returned = llm.generate(prompts, _PARAMS, show_progress=False)
  deltas = list(llm.stream(prompts, _PARAMS))
  ids = sorted({d.request_id for d in deltas})
  for i, out in zip(ids, returned, strict=True):
    mine = [d for d in deltas if d.request_id == i]
    assert ''.join(d.text for d in mine) == out.text
    tokens = tuple(t for d in mine for t in d.token_ids)
    assert tokens == out.outputs[0].token_ids
    assert mine[-1].output.outputs == out.outputs
    logprobs = tuple(lp for d in mine for lp in d.logprobs)
    assert logprobs == out.outputs[0].logprobs
  # More than one delta each: it did stream.
  assert len(deltas) > 2 * len(prompts)


def test_a_stream_that_is_closed_leaves_nothing(llm):
  stream = llm.stream('Hello', _PARAMS)
  next(stream)
  stream.close()
  assert llm.engine.num_unfinished == 0
  assert llm.engine.num_held_pages == 0


def test_chat_is_generate_of_the_rendered_template(llm):
  conversation = [{'role': 'user', 'content': 'Hi'}]
  [out] = llm.chat(conversation, _PARAMS, show_progress=False)
  text = ChatTemplate(_TEMPLATE).render(conversation)
  assert text == '<user>Hi<assistant>'
  prompt = list(text.encode())
  [expected] = llm.generate([prompt], _PARAMS, show_progress=False)
  assert out.prompt_token_ids == tuple(prompt)
  assert out.outputs == expected.outputs
  assert len(llm.chat([conversation] * 3, _PARAMS, show_progress=False)) == 3


def test_without_a_template_chat_says_so(tmp_path):
  with LLM(_init(0), config=_CONFIG, tokenizer='byte', engine=_ENGINE) as llm:
    with pytest.raises(ValueError, match='no chat template'):
      llm.chat([{'role': 'user', 'content': 'Hi'}])


def test_updated_parameters_are_served_in_place(llm):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: 'compile' in name and compiled.append(name)
  )
  texts = set()
  for seed in (1, 2):
    params = jax.device_put(
      _init(seed), jax.tree.map(lambda x: x.sharding, llm.runner._params)
    )
    compiled.clear()
    llm.update_params(params)
    [out] = llm.generate('Hello there', _PARAMS, show_progress=False)
    assert not compiled, json.dumps(compiled)
    # What is served is what the trainer's own forward says, and not another's.
    parity = logprob_parity(_CONFIG, params, [out])
    assert parity.num_tokens == 8 and parity.max < 1e-4
    assert logprob_parity(_CONFIG, _init(9), [out]).mean > 1e-2
    texts.add(out.text)
    pointer = lambda x: x.addressable_shards[0].data.unsafe_buffer_pointer()
    served = llm.runner._params['embed']['embedding']
    assert pointer(served) == pointer(params['embed']['embedding'])
  assert len(texts) == 2
  wrong = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  with pytest.raises(ValueError, match='bfloat16'):
    llm.update_params(wrong)
