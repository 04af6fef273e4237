"""split_fuse computes steps of one size (https://arxiv.org/abs/2401.08671)."""

import pytest

from jaxserve.schedulers import base
from jaxserve.schedulers.split_fuse import split_fuse
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate


def _request(i, num_tokens, num_computed=0, num_pages=0):
  return base.Request(
    i, i, num_tokens, num_computed, num_pages, is_running=num_pages > 0
  )


def test_the_last_prompt_is_cut_to_fill_the_step():
  requests = [_request(0, 9, 8, 1), _request(1, 10), _request(2, 10)]
  budget = base.Budget(100, 8, 64, 16)
  assert split_fuse(16)(requests, budget).run == {0: 1, 1: 10, 2: 5}
  # With no decode to delay, too: the difference from `chunked_prefill`.
  assert split_fuse(16)(requests[1:], budget).run == {1: 10, 2: 6}
  assert split_fuse(500)([_request(0, 400)], budget).run == {0: 100}


def test_every_step_is_full_while_prompts_last():
  lengths = [300, 7, 1, 64, 129, 30, 200, 5]
  arrivals = [Arrival(0.0, (i,) * n, 3) for i, n in enumerate(lengths)]
  machine = Machine(CostModel(1.0, 0.0, 0.0), 512, 8, keeps_prefixes=False)
  steps = simulate(split_fuse(64), arrivals, machine).steps
  # Tokens computed in all: the last one generated of each is not.
  total = sum(lengths) + 2 * len(lengths)
  sizes = [s.num_tokens for s in steps]
  assert sum(sizes) == total and max(sizes) == 64
  assert sizes[: sum(lengths) // 64] == [64] * (sum(lengths) // 64)


def test_refuses_an_empty_step():
  with pytest.raises(ValueError, match='token_budget=0'):
    split_fuse(0)
