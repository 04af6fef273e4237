"""Every scheduler respects the budget and lets every request finish."""

import dataclasses
import random

import pytest

from jaxserve import schedulers
from jaxserve.schedulers import base

_PAGE_SIZE = 4
_NUM_PAGES = 24


def _pages(num_tokens):
  return -(-num_tokens // _PAGE_SIZE)


@pytest.mark.parametrize('name', schedulers.names())
@pytest.mark.parametrize('seed', range(20))
def test_budget_and_progress(name, seed):
  rng = random.Random(seed)
  schedule = schedulers.get(name)()
  live, left = {}, {}
  for i in range(12):
    prompt_len = rng.randint(1, 80)
    live[i] = base.Request(id=i, arrival=i, num_tokens=prompt_len)
    left[i] = rng.randint(1, 4 * _NUM_PAGES - prompt_len)
  for _ in range(10_000):
    if not live:
      return
    free = _NUM_PAGES - sum(r.num_pages for r in live.values())
    budget = base.Budget(
      max_tokens=32, max_requests=4, free_pages=free, page_size=_PAGE_SIZE
    )
    shuffled = rng.sample(list(live.values()), len(live))
    plan = schedule(shuffled, budget)
    assert plan == schedule(shuffled, budget), 'not deterministic'
    assert plan.run and not set(plan.run) & set(plan.preempt)
    assert sum(plan.run.values()) <= budget.max_tokens
    for i in plan.preempt:
      assert live[i].is_running
      live[i] = dataclasses.replace(
        live[i], num_computed=0, num_pages=0, is_running=False
      )
    for i, n in plan.run.items():
      r = live[i]
      assert 1 <= n <= r.remaining
      computed = r.num_computed + n
      sampled = computed == r.num_tokens
      left[i] -= sampled
      live[i] = dataclasses.replace(
        r,
        num_computed=computed,
        num_tokens=r.num_tokens + sampled,
        num_pages=_pages(computed),
        is_running=True,
      )
    assert sum(r.num_pages for r in live.values()) <= _NUM_PAGES
    assert sum(r.is_running for r in live.values()) <= budget.max_requests
    live = {i: r for i, r in live.items() if left[i]}
  pytest.fail('starved')
