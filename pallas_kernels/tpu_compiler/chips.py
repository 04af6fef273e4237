"""TPU chips: what the schedule's cycles are counted and compared with.

Peaks, memory and bandwidth are Google's published ones
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, per device: a v4
or v5p device is two cores that work as one, a tpu7x device is one of the chip's
two). A clock is peak / (cores x MXUs x FLOPs a cycle); compiled matrix products
then reach 90 to 97 % of the peak.

DMA timings are those of libtpu's own latency model, found with kernels of one
DMA, with these exceptions. v5e read latency (libtpu: 1130) is fitted to the
published time of a 4096^3 product in 128^3 blocks, 11.67 ms
(https://docs.jax.dev/en/latest/pallas/tpu/matmul.html). tpu7x bandwidth
(libtpu: 1688, above the published peak) is capped at 86 % of the peak, the best
published decode (https://arxiv.org/abs/2604.15464). libtpu has no model for v4:
its numbers are guesses.

The network is published as bandwidth per chip in both directions together
(https://cloud.google.com/tpu/docs/v5e: 400 GB/s on 4 ports, hence 50 a link and
direction; v4 600 on 6, v5p 1200 on 6, v6e 800 on 4, tpu7x 1200 on 6). Slices of
v5e and v6e close to rings at 16 chips, those of the others at multiples of 4.
Host memory is behind PCIe, about 16 GB/s a chip, 32 from v6e on
(https://jax-ml.github.io/scaling-book, section 2).
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class DmaTiming:
  """How long copies take, in cycles of the chip's clock.

  Attributes:
    read_latency: From the last byte of a read of HBM to its completion.
    write_latency: The same for writes.
    bytes_per_cycle: Of a whole device's HBM.
  """

  read_latency: float
  write_latency: float
  bytes_per_cycle: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation, numbers per JAX device.

  Attributes:
    name: As in topology names.
    smallest: Smallest topology; a single device is its first.
    accelerator_type: What libtpu is told it runs on; any that exists.
    config: Of the chip, in libtpu's words; `None` is its default. Two cores
      that work as one are a 'megacore'.
    devices_per_chip: JAX devices on a chip.
    cores: TensorCores of a device.
    clock_ghz: Cycles per nanosecond.
    num_mxus: Matrix units of a core.
    mxu_size: Rows and columns of one.
    matmul_cycles: Cycles one `vmatmul` holds its MXU: 16-bit and below, 32-bit.
    matmul_rows: Rows that it multiplies: the same two.
    delay_slots: Bundles executed after a branch.
    hbm_unit: Bytes of one step of an HBM address.
    granule: Bytes of one step of a copy's size and addresses.
    hbm_gib: Memory.
    hbm_gb_per_s: Its peak bandwidth, 1e9 bytes per second.
    peak_tflops: Dense bfloat16.
    dma: Timing of copies.
    ici_gb_per_s: Of one link between chips, in one direction.
    ring: A dimension of the network closes to a ring at multiples of it.
    host_gb_per_s: To and from the host's memory.
  """

  name: str
  smallest: str
  accelerator_type: str
  config: str | None
  devices_per_chip: int
  cores: int
  clock_ghz: float
  num_mxus: int
  mxu_size: int
  matmul_cycles: tuple[int, int]
  matmul_rows: tuple[int, int]
  delay_slots: int
  hbm_unit: int
  granule: int
  hbm_gib: float
  hbm_gb_per_s: float
  peak_tflops: float
  dma: DmaTiming
  ici_gb_per_s: float
  ring: int
  host_gb_per_s: float


_MXU_128 = dict(
  num_mxus=4, mxu_size=128, matmul_cycles=(16, 8), matmul_rows=(16, 8)
)
_MXU_256 = dict(
  num_mxus=2, mxu_size=256, matmul_cycles=(8, 4), matmul_rows=(16, 8)
)

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name='v4',
      smallest='v4:2x2x1',
      accelerator_type='v4-8',
      config='megacore',
      devices_per_chip=1,
      cores=2,
      clock_ghz=1.05,
      delay_slots=1,
      hbm_unit=512,
      granule=512,
      hbm_gib=32.0,
      hbm_gb_per_s=1228.0,
      peak_tflops=275.0,
      dma=DmaTiming(900.0, 450.0, 0.85 * 1228 / 1.05),
      ici_gb_per_s=50.0,
      ring=4,
      host_gb_per_s=16.0,
      **_MXU_128,
    ),
    Chip(
      name='v5e',
      smallest='v5e:2x2',
      accelerator_type='v5litepod-4',
      config=None,
      devices_per_chip=1,
      cores=1,
      clock_ghz=1.5,
      delay_slots=4,
      hbm_unit=512,
      granule=32,
      hbm_gib=16.0,
      hbm_gb_per_s=819.0,
      peak_tflops=197.0,
      dma=DmaTiming(655.0, 436.0, 490.9),
      ici_gb_per_s=50.0,
      ring=16,
      host_gb_per_s=16.0,
      **_MXU_128,
    ),
    Chip(
      name='v5p',
      smallest='v5p:2x2x1',
      accelerator_type='v5p-8',
      config=None,
      devices_per_chip=1,
      cores=2,
      clock_ghz=1.75,
      delay_slots=4,
      hbm_unit=32,
      granule=32,
      hbm_gib=95.0,
      hbm_gb_per_s=2765.0,
      peak_tflops=459.0,
      dma=DmaTiming(658.0, 615.0, 1250.8),
      ici_gb_per_s=100.0,
      ring=4,
      host_gb_per_s=16.0,
      **_MXU_128,
    ),
    Chip(
      name='v6e',
      smallest='v6e:2x2',
      accelerator_type='v6e-4',
      config=None,
      devices_per_chip=1,
      cores=1,
      clock_ghz=1.75,
      delay_slots=4,
      hbm_unit=32,
      granule=32,
      hbm_gib=32.0,
      hbm_gb_per_s=1638.0,
      peak_tflops=918.0,
      dma=DmaTiming(542.0, 450.0, 775.9),
      ici_gb_per_s=100.0,
      ring=16,
      host_gb_per_s=32.0,
      **_MXU_256,
    ),
    Chip(
      name='tpu7x',
      smallest='tpu7x:2x2x1',
      accelerator_type='v5litepod-4',
      config=None,
      devices_per_chip=2,
      cores=1,
      clock_ghz=2.2,
      delay_slots=6,
      hbm_unit=32,
      granule=32,
      hbm_gib=96.0,
      hbm_gb_per_s=7380 / 2,
      peak_tflops=2307 / 2,
      dma=DmaTiming(690.0, 591.0, 1442.0),
      ici_gb_per_s=100.0,
      ring=4,
      host_gb_per_s=32.0,
      **_MXU_256,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Target:
  """What to compile for.

  Attributes:
    chip: The generation.
    topology: Name that libtpu knows.
    num_devices: How many of its devices are used.
  """

  chip: Chip
  topology: str
  num_devices: int


def parse_topology(topology: str) -> Target:
  """Reads 'v5e' (one device), 'v5e:4x8' or 'v5p:4x4x4' (a whole slice).

  Raises:
    ValueError: An unknown chip, or a shape that its network does not have.
  """
  name, colon, shape = topology.partition(':')
  if name not in CHIPS:
    raise ValueError(
      f'topology {topology!r}: unknown chip {name!r}; known: {", ".join(CHIPS)}'
    )
  chip = CHIPS[name]
  if not colon:
    return Target(chip, chip.smallest, 1)
  rank = chip.smallest.count('x', len(name)) + 1
  if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{rank - 1}}}', shape):
    raise ValueError(
      f'topology {topology!r}: {name} slices are named like {chip.smallest!r}, '
      f'with {rank} sizes'
    )
  num_chips = math.prod(map(int, shape.split('x')))
  return Target(chip, topology, num_chips * chip.devices_per_chip)


def wraps(chip: Chip, size: int) -> bool:
  """Whether `size` chips along a dimension of a slice form a ring."""
  return size % chip.ring == 0
