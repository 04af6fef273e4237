"""Served greedy tokens equal recomputing the whole sequence, always."""

import dataclasses

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.sampling_params import SamplingParams

_MAX_NEW = 12
# Prompt length, new tokens, and the engine step at which it arrives.
_REQUEST = st.tuples(
  st.integers(1, 40), st.integers(1, _MAX_NEW), st.integers(0, 30)
)


def _prompt(index, length):
  return [(7 * index + 13 * i + i * i) % 256 for i in range(length)]


def _serve(engine, arrivals):
  """Runs requests that arrive at given steps; checks the waste bound."""
  done, step = {}, 0
  pending = sorted(enumerate(arrivals), key=lambda item: item[1][2])
  index_of = {}
  while pending or engine.num_unfinished:
    while pending and pending[0][1][2] <= step:
      index, (length, count, _) = pending.pop(0)
      params = SamplingParams(max_tokens=count, temperature=0)
      index_of[engine.add_request(_prompt(index, length), params)] = index
    for out in engine.step():
      done[index_of[out.request_id]] = out.outputs[0].token_ids
    step += 1
  return done


def _check(tiny, engine, arrivals, page_size):
  done = _serve(engine, arrivals)
  assert sorted(done) == list(range(len(arrivals)))
  for index, (length, count, _) in enumerate(arrivals):
    assert done[index] == tiny.greedy(_prompt(index, length), count), index
  for s in engine.metrics.steps:
    assert 0 <= s.wasted_slots < s.num_running * page_size
  return engine.metrics


@settings(max_examples=25)
@given(
  arrivals=st.lists(_REQUEST, min_size=1, max_size=9),
  chunk=st.integers(1, 24),
  num_pages=st.integers(13, 96),
)
def test_any_arrival_chunk_and_preemption(
  tiny, small_engine, small_runner, arrivals, chunk, num_pages
):
  config = dataclasses.replace(small_engine, scheduler_kwargs={'chunk': chunk})
  engine = tiny.engine(small_runner, config, num_pages=num_pages)
  _check(tiny, engine, arrivals, config.page_size)


_BURST = [(3 * i % 37 + 1, 4 + i % 9, i // 3) for i in range(12)]


def test_preemption_happens_and_changes_nothing(
  tiny, small_engine, small_runner
):
  engine = tiny.engine(small_runner, small_engine, num_pages=14)
  metrics = _check(tiny, engine, _BURST, small_engine.page_size)
  assert metrics.num_preemptions > 0


@pytest.mark.parametrize('page_size', [1, 3, 16])
def test_any_page_size(tiny, page_size):
  config = EngineConfig(
    max_num_requests=3,
    page_size=page_size,
    num_pages=-(-120 // page_size),
    max_step_tokens=16,
    token_buckets=(16,),
  )
  engine = tiny.engine(tiny.runner(config), config)
  _check(tiny, engine, _BURST, page_size)


# tensor=4 is more shards than kv heads; the last has a sharded MLP too.
@pytest.mark.parametrize('mesh', ['tensor=2', 'tensor=4', 'data=2,tensor=4'])
def test_any_mesh(tiny, mesh):
  config = EngineConfig(
    max_num_requests=4,
    page_size=4,
    num_pages=16,
    max_step_tokens=24,
    token_buckets=(24,),
  )
  engine = tiny.engine(tiny.runner(config, mesh), config)
  metrics = _check(tiny, engine, _BURST, config.page_size)
  assert metrics.num_preemptions > 0
