"""prefix_grouped shares prefixes globally (https://arxiv.org/abs/2412.03594)."""

import itertools
import os

from hypothesis import given
from hypothesis import strategies as st
import numpy as np

from jaxserve.schedulers import base
from jaxserve.schedulers.prefix_grouped import Group
from jaxserve.schedulers.prefix_grouped import group
from jaxserve.schedulers.prefix_grouped import prefix_grouped
from jaxserve.simulate.cost import CostModel
from jaxserve.simulate.simulator import Arrival
from jaxserve.simulate.simulator import Machine
from jaxserve.simulate.simulator import simulate


def _shared(prompts, page_size):
  """Whole pages common to all of `prompts`, a token of each left over."""
  common = len(os.path.commonprefix([tuple(p) for p in prompts]))
  return min([common, *(len(p) - 1 for p in prompts)]) // page_size * page_size


def _partitions(items):
  if not items:
    yield []
    return
  first, *rest = items
  for partition in _partitions(rest):
    yield [[first], *partition]
    for i, part in enumerate(partition):
      yield [*partition[:i], [first, *part], *partition[i + 1 :]]


def _most_saved(prompts, page_size):
  """Over every way to form groups."""
  return max(
    sum(
      (len(part) - 1) * _shared([prompts[i] for i in part], page_size)
      for part in partition
    )
    for partition in _partitions(list(range(len(prompts))))
  )


_TEXT = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@given(st.lists(_TEXT, min_size=1, max_size=7), st.integers(1, 3))
def test_groups_save_the_most_tokens(prompts, page_size):
  groups = group(prompts, page_size)
  members = list(itertools.chain(*(g.members for g in groups)))
  assert sorted(members) == list(range(len(prompts)))
  for g in groups:
    assert g.prefix_len <= _shared([prompts[i] for i in g.members], page_size)
  assert sum(g.num_saved for g in groups) == _most_saved(prompts, page_size)


def test_a_child_is_forked_where_that_saves_more_than_it_costs():
  # `k` prompts of one document share `t` tokens more than the `c` that all
  # share: on their own they save (k - 1) t and compute the c once more.
  c, t = 8, 4
  for k, is_forked in ((2, False), (3, False), (4, True)):
    prompts = [(0,) * c + (1,) * t + (10 + i, 5) for i in range(k)]
    prompts += [(0,) * c + (20 + i, 5) for i in range(3)]
    lens = {g.prefix_len for g in group(prompts, 1)}
    assert ((k - 1) * t > c) == is_forked
    assert lens == ({c, c + t} if is_forked else {c})


def test_unrelated_prompts_stay_alone():
  assert group([(1, 2), (3, 4)], 1) == [Group((0,), 0), Group((1,), 0)]
  assert group([], 1) == []


def _request(i, prompt, max_tokens=1, num_computed=0):
  return base.Request(
    id=i,
    arrival=i,
    num_tokens=len(prompt),
    num_computed=num_computed,
    num_pages=-(-num_computed // 4),
    is_running=num_computed > 0,
    prompt=prompt,
    max_tokens=max_tokens,
  )


def _budget(num_cached=lambda r: 0):
  return base.Budget(64, 16, 1000, 4, num_cached=num_cached)


def test_one_leads_and_the_others_wait_for_its_prefix():
  prompts = [(0,) * 16 + (i,) * 4 for i in range(1, 4)]
  waiting = [_request(i, p) for i, p in enumerate(prompts)]
  schedule = prefix_grouped()
  assert schedule(waiting, _budget()).run == {0: 20}
  # Under way, and not yet far enough.
  leads = [_request(0, prompts[0], num_computed=8), *waiting[1:]]
  assert schedule(leads, _budget()).run == {0: 12}
  # In the cache: both skip it.
  leads = [_request(0, prompts[0], num_computed=16), *waiting[1:]]
  cached = _budget(lambda r: 16)
  assert schedule(leads, cached).run == {0: 4, 1: 4, 2: 4}
  # There is no cache: they need not wait for ever.
  assert schedule(leads, _budget()).run == {0: 4, 1: 20, 2: 20}
  # It has gone, and the cache has lost the prefix: the next one leads.
  assert schedule(waiting[1:], _budget()).run == {1: 20}


def test_decode_heavy_groups_first():
  requests = [
    _request(0, (0,) * 16 + (1,), max_tokens=4),
    _request(1, (5,) * 20, max_tokens=8),
    _request(2, (0,) * 16 + (2,), max_tokens=6),
    _request(3, (6,) * 2, max_tokens=4),
  ]
  # Ratios: 4 / 2; 10 / (16 + 1 + 1), whose prefix counts once; 8 / 20.
  plan = prefix_grouped()(requests, _budget())
  assert list(plan.run) == [3, 0, 1]


def test_every_prefix_is_computed_once_though_little_fits():
  rng = np.random.default_rng(0)
  documents = [tuple(rng.integers(0, 99, 64).tolist()) for _ in range(8)]
  arrivals = [
    Arrival(0.0, documents[i % 8] + (100 + i,) * 8, 2 + i % 8)
    for i in range(48)
  ]
  machine = Machine(CostModel(1.0, 0.0, 0.0), 128, 4, num_pages=48, page_size=4)
  result = simulate(prefix_grouped(), arrivals, machine)
  total = sum(len(a.prompt) for a in arrivals)
  saved = sum(g.num_saved for g in group([a.prompt for a in arrivals], 4))
  assert saved == 8 * 5 * 64
  assert sum(s.num_prefilled for s in result.served) == total - saved
