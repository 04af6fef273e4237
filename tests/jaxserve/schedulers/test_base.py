"""What `admit` promises beyond what every scheduler is tested for."""

from jaxserve.schedulers import base


def _request(i, num_tokens, num_computed=0, num_pages=0):
  return base.Request(
    i, i, num_tokens, num_computed, num_pages, is_running=num_pages > 0
  )


def _budget(max_tokens=100, max_requests=8, free_pages=64, **kwargs):
  return base.Budget(max_tokens, max_requests, free_pages, 16, **kwargs)


def test_a_waiting_prompt_starts_behind_what_is_cached():
  budget = _budget(num_cached=lambda r: 32)
  assert base.admit([_request(0, 40)], budget, 100).run == {0: 8}
  # All of it cached: the last token is computed again, to sample from.
  assert base.admit([_request(0, 32)], budget, 100).run == {0: 1}


def test_pages_that_others_hold_cost_nothing():
  budget = _budget(free_pages=1, num_cached=lambda r: 32)
  assert base.admit([_request(0, 40)], budget, 100).run == {}
  budget = _budget(
    free_pages=1, num_cached=lambda r: 32, num_shared=lambda r: 32
  )
  assert base.admit([_request(0, 40)], budget, 100).run == {0: 8}


def test_the_first_that_finds_no_room_keeps_out_those_after_it():
  ordered = [_request(0, 90), _request(1, 10)]
  assert base.admit(ordered, _budget(free_pages=5), 100).run == {}
  assert base.admit(ordered[::-1], _budget(free_pages=5), 100).run == {1: 10}


def test_nobody_is_preempted_where_that_is_not_enough():
  # The first lacks 2 pages; the only one that is newer holds 1.
  ordered = [_request(0, 64, 16, 1), _request(1, 17, 16, 1)]
  plan = base.admit(ordered, _budget(free_pages=1), 48)
  assert plan.preempt == () and plan.run == {1: 1}


def test_rank_says_who_gives_way():
  ordered = [_request(i, 17, 16, 1) for i in range(3)]
  plan = base.admit(ordered, _budget(free_pages=0), 1, rank=lambda r: -r.id)
  # 0 ranks last: it takes from nobody, and gives way to 1.
  assert plan.preempt == (0,) and plan.run == {1: 1}


def test_idle_ones_keep_rows_and_give_pages():
  idle = [_request(1, 20, 16, 1), _request(2, 20, 16, 1)]
  newcomer = _request(3, 8)
  budget = _budget(max_requests=2)
  assert base.admit([newcomer], budget, 10, idle=idle).run == {}
  older = _request(0, 17, 16, 1)
  plan = base.admit([older], _budget(free_pages=0), 10, idle=idle)
  assert plan == base.Plan({0: 1}, (2,))


def test_a_prompt_leaves_a_token_to_each_decode_after_it():
  ordered = [_request(0, 90, 16, 1)]
  ordered += [_request(i, 10, 9, 1) for i in range(1, 4)]
  plan = base.admit(ordered, _budget(max_tokens=10), 100)
  assert plan.run == {0: 7, 1: 1, 2: 1, 3: 1}


def test_displace_takes_rows_and_pages_of_larger_rank_only():
  running = [_request(1, 17, 16, 2), _request(4, 17, 16, 2)]
  newcomers = [_request(3, 8), _request(5, 8)]
  ordered = sorted(running + newcomers, key=lambda r: r.arrival)
  plan = base.admit(ordered, _budget(max_requests=2), 10, displace=True)
  # 3 takes the row of 4; 5, after 4, gets nothing.
  assert plan == base.Plan({1: 1, 3: 8}, (4,))
  assert base.admit(ordered, _budget(max_requests=2), 10).preempt == ()
  # A page for its prompt and one to go on with, for it and for 1.
  plan = base.admit(ordered, _budget(free_pages=1), 10, displace=True)
  assert plan == base.Plan({1: 1, 3: 8}, (4,))


def test_expected_pages_are_kept_free():
  running, newcomer = _request(0, 17, 16, 2), _request(1, 8)
  expected = lambda r: 6 if r.id == 0 else 3
  run = lambda free: (
    base.admit(
      [running, newcomer], _budget(free_pages=free), 10, expected_pages=expected
    ).run
  )
  assert run(6) == {0: 1} and run(7) == {0: 1, 1: 8}
  # Alone, a request comes in whatever is expected of it.
  plan = base.admit(
    [newcomer], _budget(free_pages=1), 10, expected_pages=lambda r: 99
  )
  assert plan.run == {1: 8}
