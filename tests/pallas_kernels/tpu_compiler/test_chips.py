"""Names of topologies, and the chip table against itself."""

import pytest

from pallas_kernels.tpu_compiler import chips


@pytest.mark.parametrize(
  'topology, libtpu_name, num_devices',
  [
    ('v5e', 'v5e:2x2', 1),
    ('v4', 'v4:2x2x1', 1),
    ('tpu7x', 'tpu7x:2x2x1', 1),
    ('v5e:4x8', 'v5e:4x8', 32),
    ('v5p:4x4x4', 'v5p:4x4x4', 64),
    ('tpu7x:2x2x1', 'tpu7x:2x2x1', 8),
  ],
)
def test_parse_topology(topology, libtpu_name, num_devices):
  target = chips.parse_topology(topology)
  assert target.chip.name == topology.partition(':')[0]
  assert target.topology == libtpu_name
  assert target.num_devices == num_devices


@pytest.mark.parametrize(
  'topology, message',
  [
    ('v3:2x2', 'known: v4, v5e, v5p, v6e, tpu7x'),
    ('', 'unknown chip'),
    ('v5p:4x4', 'with 3 sizes'),
    ('v6e:2x2x1', 'with 2 sizes'),
    ('v5e:', 'with 2 sizes'),
    ('v5e:0x2', 'with 2 sizes'),
    ('v5e:2x', 'with 2 sizes'),
  ],
)
def test_parse_topology_refuses(topology, message):
  with pytest.raises(ValueError, match=message):
    chips.parse_topology(topology)


@pytest.mark.parametrize('chip', chips.CHIPS.values(), ids=chips.CHIPS)
def test_matmuls_back_to_back_reach_the_peak(chip):
  rows, cycles = chip.matmul_rows[0], chip.matmul_cycles[0]
  flops_per_cycle = 2 * chip.mxu_size**2 * rows / cycles
  tflops = flops_per_cycle * chip.num_mxus * chip.cores * chip.clock_ghz / 1e3
  assert tflops == pytest.approx(chip.peak_tflops, rel=0.01)


@pytest.mark.parametrize('chip', chips.CHIPS.values(), ids=chips.CHIPS)
def test_copies_stay_below_the_peak_bandwidth(chip):
  gb_per_s = chip.dma.bytes_per_cycle * chip.clock_ghz
  assert 0.75 * chip.hbm_gb_per_s < gb_per_s < 0.95 * chip.hbm_gb_per_s
