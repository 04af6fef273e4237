"""chunked_prefill never stalls a decode (https://arxiv.org/abs/2403.02310)."""

import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.chunked_prefill import chunked_prefill


def _request(i, num_tokens, num_computed=0, num_pages=0, is_running=False):
  return base.Request(i, i, num_tokens, num_computed, num_pages, is_running)


def _budget(max_tokens=100, max_requests=8, free_pages=64, page_size=16):
  return base.Budget(max_tokens, max_requests, free_pages, page_size)


def _numpy_sarathi(requests, token_budget):
  """Algorithm 3: decodes, then ongoing prefills, then new ones."""
  batch, used = {}, 0
  for r in requests:
    if r.is_running and r.remaining == 1:
      batch[r.id] = 1
      used += 1
  for r in requests:
    if r.is_running and r.remaining > 1:
      batch[r.id] = min(r.remaining, token_budget - used)
      used += batch[r.id]
  for r in requests:
    if not r.is_running and used < token_budget:
      batch[r.id] = min(r.remaining, token_budget - used)
      used += batch[r.id]
  return {i: n for i, n in batch.items() if n}


def test_is_algorithm_3_while_pages_last():
  requests = [
    _request(0, 40, 16, 1, True),
    _request(1, 31, 30, 2, True),
    _request(2, 50),
    _request(3, 18, 17, 2, True),
    _request(4, 90),
    _request(5, 10),
  ]
  for token_budget in (2, 3, 20, 27, 60, 200):
    plan = chunked_prefill(chunk=10**6)(
      requests, _budget(max_tokens=token_budget, free_pages=10**6)
    )
    assert plan.run == _numpy_sarathi(requests, token_budget)
    assert plan.preempt == ()


def test_decodes_run_before_a_long_prompt():
  requests = [_request(0, 4096), _request(1, 9, 8, 1, True)]
  plan = chunked_prefill(chunk=64)(requests, _budget())
  assert plan.run == {1: 1, 0: 64}


def test_the_newest_gives_way():
  # Each decode is at a page boundary and no page is free.
  requests = [_request(i, 17, 16, 1, True) for i in range(4)]
  plan = chunked_prefill()(requests, _budget(free_pages=0))
  assert plan.preempt == (3, 2)
  assert plan.run == {0: 1, 1: 1}


def test_a_newcomer_leaves_a_page_for_each_running_request():
  running = [_request(i, 10, 9, 1, True) for i in range(3)]
  newcomer = _request(3, 16)
  schedule = chunked_prefill()
  assert 3 not in schedule([*running, newcomer], _budget(free_pages=3)).run
  assert 3 in schedule([*running, newcomer], _budget(free_pages=4)).run


def test_refuses_an_empty_chunk():
  with pytest.raises(ValueError, match='chunk=0'):
    chunked_prefill(chunk=0)


def test_the_token_budget_bounds_steps_that_delay_decodes():
  schedule = chunked_prefill(chunk=64, token_budget=20)
  prompt = _request(0, 90)
  decodes = [_request(i, 9, 8, 1, True) for i in range(1, 4)]
  assert schedule([prompt, *decodes], _budget()).run == {
    **{1: 1, 2: 1, 3: 1},
    0: 17,
  }
  assert schedule([prompt], _budget()).run == {0: 64}
  # Every decode runs, even beyond the token budget.
  many = [_request(i, 9, 8, 1, True) for i in range(1, 26)]
  run = schedule([prompt, *many], _budget(max_requests=99)).run
  assert run == {r.id: 1 for r in many}


def test_refuses_an_empty_token_budget():
  with pytest.raises(ValueError, match='token_budget=0'):
    chunked_prefill(token_budget=0)
