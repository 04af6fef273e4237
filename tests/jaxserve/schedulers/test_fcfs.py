"""fcfs runs whole prompts before decodes (https://arxiv.org/abs/2309.06180)."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers import base
from jaxserve.schedulers.fcfs import fcfs


def _request(i, num_tokens, num_computed=0):
  return base.Request(
    id=i,
    arrival=i,
    num_tokens=num_tokens,
    num_computed=num_computed,
    num_pages=-(-num_computed // 16),
    is_running=num_computed > 0,
  )


def _budget(max_tokens=100, max_requests=8):
  return base.Budget(max_tokens, max_requests, 10**6, 16)


def _reference(requests, max_tokens, max_requests):
  """The policy of the paper's engine, written as it admits a prompt."""
  waiting = [r for r in requests if not r.is_running]
  running = [r for r in requests if r.is_running]
  batch, used = {}, 0
  while waiting:
    r = waiting[0]
    if used + r.num_tokens > max_tokens:
      break
    if len(running) + len(batch) + 1 > max_requests:
      break
    batch[r.id] = r.num_tokens
    used += r.num_tokens
    waiting.pop(0)
  return batch or {r.id: 1 for r in running}


@given(
  st.lists(st.integers(1, 60), max_size=6),
  st.lists(st.integers(1, 100), max_size=6),
  st.integers(60, 120),
  st.integers(6, 8),
)
def test_is_the_reference_while_pages_last(running, prompts, tokens, rows):
  requests = [_request(i, n + 1, n) for i, n in enumerate(running)]
  requests += [_request(i, n) for i, n in enumerate(prompts, len(running))]
  requests = [r for r in requests if r.num_tokens <= tokens]
  plan = fcfs()(requests[::-1], _budget(tokens, rows))
  assert plan == base.Plan(_reference(requests, tokens, rows))


def test_decodes_stall_while_a_prompt_is_split():
  schedule = fcfs()
  decode = _request(0, 9, 8)
  assert schedule([decode, _request(1, 250)], _budget()).run == {1: 100}
  under_way = _request(1, 250, 100)
  plan = schedule([decode, under_way, _request(2, 10)], _budget())
  assert plan.run == {1: 100}
  # The last piece shares its step with the next prompt.
  under_way = _request(1, 250, 200)
  plan = schedule([decode, under_way, _request(2, 10)], _budget())
  assert plan.run == {1: 50, 2: 10}


def test_a_prompt_that_no_step_holds_starts_alone():
  plan = fcfs()([_request(0, 40), _request(1, 250)], _budget())
  assert plan.run == {0: 40}


def test_a_newer_prompt_does_not_pass_an_older_one():
  plan = fcfs()([_request(0, 70), _request(1, 40), _request(2, 5)], _budget())
  assert plan.run == {0: 70}


def test_decodes_go_on_where_no_prompt_finds_pages():
  decode = _request(0, 10, 9)
  under_way = base.Request(1, 1, 250, 16, 1, True)
  budget = base.Budget(100, 8, 0, 16)
  assert fcfs()([decode, under_way], budget).run == {0: 1}
