"""Host memory: what is kept, for how long, and what it costs.

The host tier under a prefix cache is in `test_prefix.py`.
"""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxserve.cache import offload
from jaxserve.cache.offload import HostTier
from jaxserve.cache.offload import Rate
from jaxserve.cache.offload import SwapSpace
from jaxserve.cache.offload import TransferCosts
from jaxserve.cache.offload import swap_is_cheaper


class _Device:
  """Pages of two arrays, and copies that end when they are waited for."""

  def __init__(self):
    self.k = np.arange(20.0).reshape(10, 2)
    self.v = -self.k
    self.waited = []

  def read(self, pages):
    return _Copy(self, (self.k[pages], self.v[pages]))


class _Copy:
  def __init__(self, device, arrays):
    self._device = device
    self._arrays = arrays
    self.is_ready = False

  def wait(self):
    self._device.waited.append(self)
    return self._arrays


@given(st.lists(st.integers(-9, 4), max_size=40), st.integers(1, 6))
def test_the_tier_is_an_lru_list(moves, room):
  device, dropped = _Device(), []
  tier = HostTier(room * 8 + 7, 8, device.read)
  tier.on_drop = dropped.append
  expected, stored, gone = [], {}, []
  for name, move in enumerate(moves):
    if move < 0 and expected:
      used = expected.pop(move % len(expected))
      if move % 3:
        tier.touch([stored[used]])
        expected.append(used)
      else:
        tier.remove(stored[used])
    elif 0 <= move <= room:
      pages = [(name + i) % 10 for i in range(move)]
      owners = [(name, p) for p in pages]
      new = tier.store(pages, owners)
      stored |= zip(owners, new, strict=True)
      surplus = max(0, len(expected) + move - room)
      gone += expected[:surplus]
      expected = expected[surplus:] + owners
    assert dropped == gone
    assert tier.num_bytes == 8 * len(expected) <= tier.num_pages * 8
    assert all(stored[x] in tier for x in expected)
  for (_, p), page in stored.items():  # Whoever still has one can use it.
    k, v = page.wait()
    np.testing.assert_array_equal(k, device.k[p])
    np.testing.assert_array_equal(v, device.v[p])
    assert k.base is None, 'a view keeps its whole batch in memory'


def test_the_tier_waits_once_and_only_when_it_must():
  device = _Device()
  copies = []

  def read(pages):
    copies.append(device.read(pages))
    return copies[-1]

  tier = HostTier(80, 8, read, max_in_flight=2)
  first, second = tier.store([3, 4], 'ab')
  second.wait()
  first.wait()
  assert device.waited == copies[:1]
  tier.store([5], 'c')
  tier.store([6], 'd')
  assert device.waited == copies[:1]
  tier.store([7], 'e')  # Two copies are under way at most.
  assert device.waited == copies[:2]
  copies[3].is_ready = True
  tier.settle(only_ready=True)
  assert device.waited == [*copies[:2], copies[3]]
  tier.settle()
  tier.settle()
  assert device.waited == [*copies[:2], copies[3], copies[2]]
  tier.clear()
  assert len(tier) == tier.num_bytes == 0 and tier.num_copied == 5
  with pytest.raises(ValueError, match='capacity_bytes=7'):
    HostTier(7, 8, device.read)


def test_swap_space_counts_bytes():
  device, space = _Device(), SwapSpace(100)
  copies = [device.read([i]) for i in range(3)]
  space.put(7, copies[0], 60)
  space.put(8, copies[1], 40)
  assert space.num_bytes == 100 and not space.has_room(1) and 7 in space
  with pytest.raises(ValueError, match='request 9 needs 1 bytes'):
    space.put(9, copies[2], 1)
  with pytest.raises(ValueError, match='request 7 is swapped out'):
    space.put(7, copies[2], 0)
  assert space.pop(7) is copies[0]
  assert space.num_bytes == 40 and space.has_room(60) and len(space) == 1
  with pytest.raises(KeyError):
    space.pop(7)
  space.put(9, copies[2], 0)
  copies[2].is_ready = True
  space.settle(only_ready=True)
  assert device.waited == [copies[2]]
  space.settle()
  space.settle()
  assert device.waited == [copies[2], copies[1]]
  assert space.pop(8).wait()[0].tolist() == [[2, 3]]


def test_rate_weighs_samples_by_size_and_age():
  rate = Rate(initial=5.0, decay=0.5)
  rate.observe(0, 1.0)
  rate.observe(1, 0.0)
  assert rate.per_s == 5.0
  samples = [(10.0, 2.0), (1.0, 0.5), (30.0, 1.0)]
  for sample in samples:
    rate.observe(*sample)
  weights = [0.25, 0.5, 1.0]
  amount, seconds = np.average(samples, axis=0, weights=weights)
  assert rate.per_s == pytest.approx(amount / seconds)
  with pytest.raises(ValueError, match='decay=1'):
    Rate(decay=1)


def test_swaps_where_two_copies_take_less_time_than_computing():
  # 1,000 tokens of 1,000 bytes: 2 s of copies, or 4 s or 1 s of computing.
  assert swap_is_cheaper(1000, 1000, 250, 1e6)
  assert not swap_is_cheaper(1000, 1000, 1000, 1e6)
  costs = TransferCosts(bytes_per_s=1e6)
  assert not costs.swap_is_cheaper(1000, 1000), 'computing was never timed'
  costs.prefill.observe(500, 2.0)
  assert costs.swap_is_cheaper(1000, 1000)
  costs.copy.observe(1e5, 1.0)
  assert not costs.swap_is_cheaper(1000, 1000)


def test_one_page_of_nested_arrays():
  arrays = (np.arange(6).reshape(3, 2), [np.arange(3)])
  page = offload.first_dim(arrays, 1)
  assert page[0].tolist() == [2, 3] and page[1][0] == 1
