"""Against every choice there is."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxserve.engine.buckets import choose_buckets


def _expected_cost(buckets, costs, histogram):
  return sum(
    weight * costs[min(b for b in buckets if b >= n)]
    for n, weight in histogram.items()
    if weight
  )


@given(
  costs=st.dictionaries(
    st.integers(1, 40), st.integers(1, 100), min_size=1, max_size=7
  ),
  histogram=st.dictionaries(st.integers(1, 40), st.integers(0, 20), max_size=9),
  max_programs=st.integers(1, 8),
  reach=st.integers(1, 40),
)
def test_no_choice_is_better(costs, histogram, max_programs, reach):
  longest = max([reach, *(n for n, w in histogram.items() if w)])
  if longest > max(costs):
    with pytest.raises(ValueError, match=f'steps of {longest} tokens'):
      choose_buckets(costs, histogram, max_programs, reach=reach)
    return
  got = choose_buckets(costs, histogram, max_programs, reach=reach)
  assert list(got) == sorted(set(got)) and set(got) <= costs.keys()
  assert len(got) <= max_programs and got[-1] >= longest
  best = min(
    _expected_cost(buckets, costs, histogram)
    for k in range(1, max_programs + 1)
    for buckets in itertools.combinations(sorted(costs), k)
    if buckets[-1] >= longest
  )
  assert _expected_cost(got, costs, histogram) == best


def test_decodes_and_full_chunks():
  """Costs that grow with tokens: a bucket for each kind of step."""
  costs = {n: 1 + n / 8 for n in (8, 16, 32, 64, 128, 256)}
  histogram = {30: 900, 31: 50, 256: 40, 130: 10}
  assert choose_buckets(costs, histogram, 2) == (32, 256)
  assert choose_buckets(costs, histogram, 1) == (256,)
  assert choose_buckets(costs, histogram, 9) == (32, 256)  # No more than help.
  assert choose_buckets(costs, {5: 1}, 2, reach=100) == (8, 128)


def test_refuses_no_programs():
  with pytest.raises(ValueError, match='at most 0 programs'):
    choose_buckets({8: 1.0}, {4: 1}, 0)
