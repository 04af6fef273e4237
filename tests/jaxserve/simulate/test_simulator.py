"""Time, tokens and memory of small runs, counted by hand."""

import dataclasses

import numpy as np
import pytest

from jaxserve.schedulers.chunked_prefill import chunked_prefill
from jaxserve.simulate import metrics
from jaxserve.simulate import trace
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate

_COST = CostModel(fixed_s=1.0, token_s=0.1, kv_token_s=0.01)
_MACHINE = Machine(
  _COST, max_tokens=8, max_requests=4, num_pages=8, page_size=4
)


def test_one_request_alone():
  result = simulate(chunked_prefill(), [Arrival(5.0, (0,) * 10, 3)], _MACHINE)
  # 8 tokens, then 2, then two decodes; each reads its whole context.
  durations = [1 + 0.8 + 0.08, 1 + 0.2 + 0.1, 1 + 0.1 + 0.11, 1 + 0.1 + 0.12]
  ends = [5 + sum(durations[: i + 1]) for i in range(4)]
  assert [s.end_s for s in result.steps] == pytest.approx(ends)
  [served] = result.served
  assert served.token_s == pytest.approx(ends[1:])
  assert (served.enter_s, served.num_prefilled) == (5.0, 10)


def test_results_are_in_the_order_of_the_trace():
  arrivals = [Arrival(9.0, (0,), 1), Arrival(0.0, (1,), 2)]
  served = simulate(chunked_prefill(), arrivals, _MACHINE).served
  assert [s.arrival for s in served] == arrivals
  assert [len(s.token_s) for s in served] == [1, 2]


def test_a_cached_prefix_is_not_computed_again():
  arrivals = [Arrival(0.0, (0,) * 8 + (i,), 1) for i in range(3)]
  arrivals[1:] = [dataclasses.replace(a, time_s=50.0) for a in arrivals[1:]]
  count = lambda machine: [
    s.num_prefilled
    for s in simulate(chunked_prefill(), arrivals, machine).served
  ]
  assert count(_MACHINE) == [9, 1, 1]
  uncached = dataclasses.replace(_MACHINE, keeps_prefixes=False)
  assert count(uncached) == [9, 9, 9]


def test_preemption_computes_again():
  arrivals = [Arrival(0.0, (i,) * 4, 16) for i in range(2)]
  tight = dataclasses.replace(_MACHINE, num_pages=6, keeps_prefixes=False)
  result = simulate(chunked_prefill(), arrivals, tight)
  first, second = result.served
  assert (first.num_preemptions, second.num_preemptions) == (0, 1)
  assert first.num_prefilled == 4 and second.num_prefilled > 8
  assert len(second.token_s) == 16
  assert sum(s.num_preempted for s in result.steps) == 1


def test_summary_of_a_run_by_hand():
  arrivals = [Arrival(0.0, (0,) * 10, 3), Arrival(0.0, (1,) * 2, 1)]
  result = simulate(chunked_prefill(), arrivals, _MACHINE)
  a, b = (s.token_s for s in result.served)
  summary = metrics.summary(result, metrics.Objective(b[0], 1.3))
  assert summary.tokens_per_s == pytest.approx(4 / a[-1])
  assert summary.latency_mean_s == pytest.approx((a[-1] + b[-1]) / 2)
  assert summary.between_tokens_max_s == pytest.approx(
    max(a[1] - a[0], a[2] - a[1])
  )
  assert summary.first_token_p99_s == pytest.approx(max(a[0], b[0]), rel=1e-6)
  assert summary.goodput == pytest.approx(2 / a[-1])
  strict = metrics.summary(result, metrics.Objective(b[0], 1.0))
  assert strict.goodput == pytest.approx(1 / a[-1])
  assert summary.prefilled_fraction == 1.0
  assert summary.service_gap == 0.0


def test_service_gap_counts_only_while_both_wait():
  machine = Machine(CostModel(1.0, 0, 0), 99, 1, keeps_prefixes=False)
  arrivals = [Arrival(0.0, (0,) * 5, 2, client='a') for _ in range(3)]
  arrivals += [Arrival(0.0, (0,) * 5, 2, client='b') for _ in range(2)]
  result = simulate(chunked_prefill(), arrivals, machine)
  # One row: all of `a` run first, 5 + 2 * 2 each. While both wait, which ends
  # as the last of `a` enters, `a` is served twice; before its first step no
  # difference is seen, as that is part of the interval.
  clients, total = metrics.service(result)
  assert clients == ['a', 'b']
  assert total[:, -1].tolist() == [27.0, 18.0]
  assert total[0].tolist()[:4] == [7.0, 9.0, 16.0, 18.0]
  assert metrics.service_gap(result) == 18.0 - 7.0


def test_cached_tokens_need_not_count_as_service():
  arrivals = [Arrival(10.0 * i, (0,) * 9, 1, client='a') for i in range(2)]
  result = simulate(chunked_prefill(), arrivals, _MACHINE)
  assert [s.num_cached for s in result.served] == [0, 8]
  _, total = metrics.service(result)
  assert total[:, -1].tolist() == [9 + 2 + 9 + 2]
  _, total = metrics.service(result, cached_weight=0.0)
  assert total[:, -1].tolist() == [9 + 2 + 1 + 2]


def test_lengths_have_the_mean_and_correlation_they_say():
  rng = np.random.default_rng(0)
  lengths = trace.Lengths(sigma=0.5, correlation=0.6, longest=10**6)
  prompts, answers = lengths.draw(rng, 20_000)
  assert prompts.mean() == pytest.approx(161, rel=0.03)
  assert answers.mean() == pytest.approx(338, rel=0.03)
  found = np.corrcoef(np.log(prompts), np.log(answers))[0, 1]
  assert found == pytest.approx(0.6, abs=0.03)
  assert trace.Lengths(longest=50).draw(rng, 1000)[1].max() == 50


def test_traces_depend_on_their_seed_alone():
  assert trace.poisson(2.0, 5, seed=3) == trace.poisson(2.0, 5, seed=3)
  assert trace.poisson(2.0, 5, seed=3) != trace.poisson(2.0, 5, seed=4)
  many = trace.poisson(4.0, 2000, lengths=trace.Lengths(2, 2))
  assert many[-1].time_s == pytest.approx(500, rel=0.1)
  asked = trace.documents(3, 4, document_len=20, question_len=2)
  assert len({a.prompt[:20] for a in asked}) == 3
  assert len({a.prompt for a in asked}) == 12


def test_steps_are_padded_to_buckets():
  padded = dataclasses.replace(_MACHINE, buckets=(4, 8))
  arrivals = [Arrival(0.0, (0,) * 10, 1)]
  result = simulate(chunked_prefill(), arrivals, padded)
  assert [(s.num_tokens, s.bucket) for s in result.steps] == [(8, 8), (2, 4)]
  assert result.steps[-1].end_s == pytest.approx(1.88 + 1 + 0.4 + 0.1)
  assert metrics.summary(result).padding_fraction == pytest.approx(2 / 12)
