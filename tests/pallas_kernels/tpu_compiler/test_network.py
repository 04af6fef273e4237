"""Times of collectives against the published bandwidth of links."""

import pytest

from pallas_kernels.tpu_compiler.chips import CHIPS
from pallas_kernels.tpu_compiler.network import Network

_MB = 10**6


def _line(chip, *shape):
  """Whole slice, devices in the order of their coordinates."""
  coords = [()]
  for size in shape:
    coords = [(*c, i) for c in coords for i in range(size)]
  return Network.of(CHIPS[chip], coords)


def _groups(count, size):
  return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))


# Bytes over links: v5e 50 GB/s is 20 us a MB, v5p 100 GB/s is 10.
@pytest.mark.parametrize(
  'chip, shape, op, size, expected',
  [
    # A line of 4: one link; 3/4 of the bytes. A ring of 4: two.
    ('v5e', (1, 4), 'all-gather', 4, 0.06),
    ('v5p', (1, 1, 4), 'all-gather', 4, 0.015),
    ('v5p', (1, 1, 4), 'all-reduce', 4, 0.03),
    # Two lines at right angles, 15/16 of the bytes.
    ('v5e', (4, 4), 'reduce-scatter', 16, 0.15),
    # A ring of 16 closes on v5e.
    ('v5e', (1, 16), 'all-gather', 16, 0.15),
    # Half of all crosses the middle: 4 x 1 MB / 4 over one link.
    ('v5e', (1, 4), 'all-to-all', 1, 0.02),
  ],
)
def test_times(chip, shape, op, size, expected):
  network = _line(chip, *shape)
  whole = _groups(1, len(network.coords))
  hops = 2e-3 * sum(s - 1 for s in shape)
  found = network.milliseconds(op, size * _MB, whole)
  assert expected <= found <= expected + hops


def test_groups_that_are_apart_share_links():
  network = _line('v5e', 1, 4)
  near = network.milliseconds('all-gather', 2 * _MB, ((0, 1), (2, 3)))
  far = network.milliseconds('all-gather', 2 * _MB, ((0, 2), (1, 3)))
  assert near == pytest.approx(0.02, abs=2e-3)
  assert far == pytest.approx(0.04, abs=2e-3)


def test_permutations_take_what_their_busiest_link_takes():
  network = _line('v5e', 1, 4)
  shift = tuple((i, (i + 1) % 4) for i in range(4))
  # Back from the end all three links are used once in the other direction.
  assert network.milliseconds('collective-permute', _MB, shift) == (
    pytest.approx(0.02, abs=4e-3)
  )
  crossing = ((0, 2), (1, 3))
  assert network.milliseconds('collective-permute', _MB, crossing) == (
    pytest.approx(0.04, abs=4e-3)
  )
  ring = _line('v5p', 1, 1, 4)
  assert ring.milliseconds('collective-permute', _MB, ((0, 3),)) == (
    pytest.approx(0.01, abs=2e-3)
  )


def test_two_devices_of_a_chip_need_no_links():
  network = Network.of(CHIPS['tpu7x'], [(0, 0, 0), (0, 0, 0), (1, 0, 0)])
  assert network.milliseconds('all-reduce', _MB, ((0, 1),)) == 0
  assert network.milliseconds('all-reduce', _MB, ((0, 2),)) > 0
