"""A kernel's time on a chip, from executing what the compiler scheduled.

The compiler's listing has one bundle a cycle; the scalar core decides which are
executed, and copies whose latency is not hidden add stalls. Against a TPU v4's
cycle counter the schedule is exact to a cycle in 224; against published v5e
times whole kernels come out 2 to 4 % short where the MXU bounds them, and up to
14 % where copies do.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re

import numpy as np

from pallas_kernels.tpu_compiler import listing as listing_lib
from pallas_kernels.tpu_compiler import machine
from pallas_kernels.tpu_compiler import placement
from pallas_kernels.tpu_compiler import program as program_lib
from pallas_kernels.tpu_compiler.chips import CHIPS
from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.dma import DmaEngine
from pallas_kernels.tpu_compiler.dump import KernelFiles
from pallas_kernels.tpu_compiler.hlo import Layout
from pallas_kernels.tpu_compiler.listing import Listing
from pallas_kernels.tpu_compiler.operands import PallasOperands

_NARROW = re.compile(r'bf16|f16|s8|u8|s4|u4|f8|e4m3|e5m2')
_UNIT_OF_MATMUL = re.compile(r'\.mxu\d|\.mrb\[\d+\]|\.(gmra|vlgmr|msra|msrb)')
# A core that moves and runs less than this of the other's is idle.
_IDLE = 0.05


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop of the kernel.

  Attributes:
    first: Its first bundle.
    last: Its last one.
    trips: How often it ran.
    cycles: Spent in it, without stalls, with the loops inside it.
  """

  first: int
  last: int
  trips: int
  cycles: int


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What executing a kernel's schedule gave; plain data.

  Where two cores share the work, cycles are those of the slower one and bytes
  are those of both.

  Attributes:
    kernel: Its name.
    chip: Name in `CHIPS`.
    cycles: From start to end.
    stall_cycles: Of them, waiting for copies and semaphores.
    cores: That have work.
    bytes_read: From HBM.
    bytes_written: To HBM.
    slots: Share of the slots used, by unit: 'MATMUL', 'VALU', 'XLU', 'VLOAD',
      'VSTORE', 'VSTORE:SPILL', 'SALU', 'EUP', ...; empty where not dumped.
    mxu_busy: Share of the MXUs' time that products hold them.
    matmuls: Number of `vmatmul` instructions of a core, by type.
    loops: The costliest first.
    stalls: Cycles by bundle, the longest first.
    transfers: Copies, by bundle.
  """

  kernel: str
  chip: str
  cycles: float
  stall_cycles: float
  cores: int
  bytes_read: int
  bytes_written: int
  slots: dict[str, float]
  mxu_busy: float
  matmuls: dict[str, int]
  loops: tuple[Loop, ...]
  stalls: tuple[tuple[int, float], ...]
  transfers: tuple[tuple[int, machine.Transfer], ...]

  @property
  def microseconds(self) -> float:
    """Time at the chip's clock."""
    return self.cycles / CHIPS[self.chip].clock_ghz / 1e3

  @property
  def bytes(self) -> int:
    """Moved from and to HBM."""
    return self.bytes_read + self.bytes_written

  @property
  def hbm_busy(self) -> float:
    """Share of the published HBM bandwidth."""
    gb_per_s = self.bytes / self.microseconds / 1e3
    return gb_per_s / CHIPS[self.chip].hbm_gb_per_s

  @property
  def spills(self) -> float:
    """Share of store slots that spill a register."""
    return self.slots.get('VSTORE:SPILL', 0.0)

  def mfu(self, flops: float) -> float:
    """Share of the chip's peak if the kernel does `flops` useful ones."""
    peak = CHIPS[self.chip].peak_tflops * 1e12
    return flops / (self.microseconds * 1e-6) / peak

  def report(self) -> str:
    """The numbers, the costliest loops, the longest stalls and the copies."""
    percent = lambda part, whole=self.cycles: f'{part / whole:.1%}'
    lines = [
      f'{self.kernel} on {self.chip}: {self.cycles:,.0f} cycles, '
      f'{self.microseconds:,.2f} us on {self.cores} core(s)',
      f'  stalls {percent(self.stall_cycles)}, MXU {self.mxu_busy:.1%}, HBM '
      f'{self.hbm_busy:.1%} ({self.bytes:,} bytes)',
      '  slots: '
      + ', '.join(f'{name} {share:.1%}' for name, share in self.slots.items()),
    ]
    for loop in self.loops[:6]:
      lines.append(
        f'  loop {loop.first:#x}-{loop.last:#x} x {loop.trips:,}: '
        f'{percent(loop.cycles)}'
      )
    for address, cycles in self.stalls[:6]:
      lines.append(f'  stall at {address:#x}: {percent(cycles)}')
    for address, t in self.transfers:
      lines.append(
        f'  copy at {address:#x}: {t.kind} x {t.count:,}, {t.bytes:,} bytes'
      )
    return '\n'.join(lines)


def run(
  files: KernelFiles,
  chip: Chip,
  *,
  layouts: Mapping[int, Layout],
  recorded: Sequence[PallasOperands],
  operands: Mapping[int, np.ndarray],
) -> Schedule:
  """Executes the schedule of a kernel.

  Args:
    files: Its files.
    chip: What it was compiled for.
    layouts: Of its operands in memory, by index.
    recorded: Operands of the program's Pallas calls, as far as known.
    operands: Values of more of them, by index.

  Raises:
    UnknownInstructionError: An instruction that is not modelled.
    UnknownValueError: Control flow needs the value of an operand.
    ScheduleError: The execution is wrong: a failed bounds check, a wait for
      ever.
  """
  listing = listing_lib.read(
    files.name, files.listing, files.allocations, files.slots
  )
  values = {**placement.known_operands(listing, recorded), **operands}
  return run_listing(listing, chip, values, layouts)


def run_listing(
  listing: Listing,
  chip: Chip,
  values: Mapping[int, np.ndarray] | None = None,
  layouts: Mapping[int, Layout] | None = None,
) -> Schedule:
  """`run` of a parsed listing."""
  program = program_lib.translate(listing, chip)
  cores = range(chip.cores if _uses_both_cores(listing) else 1)

  def executions(active):
    return [
      machine.execute(
        listing,
        program,
        placement.place(listing, chip, values or {}, layouts or {}, core),
        chip,
        DmaEngine(chip, active),
      )
      for core in cores
    ]

  runs = executions(len(cores))
  moved = [sum(r.bytes.values()) for r in runs]
  if len(runs) > 1 and min(moved) < _IDLE * max(moved):
    # The core that works has the bandwidth to itself.
    runs = executions(1)
  return _summary(listing, chip, program, runs)


def _uses_both_cores(listing):
  """Whether the kernel asks which core it is on, or waits for the other."""
  core_index = [
    f'#{name}]'
    for name, allocation in listing.allocations.items()
    if 'core index' in allocation.tag
  ]
  return any(
    i.opcode in ('vpush.ccrf', 'vsyncadd.remote')
    or (i.opcode == 'sld' and any(name in i.text for name in core_index))
    for bundle in listing.bundles
    for i in bundle
  )


def _summary(listing, chip, program, runs):
  slowest = max(runs, key=lambda r: r.cycles)
  counts = slowest.bundle_counts
  loops = [
    Loop(first, last, counts[first], sum(counts[first : last + 1]))
    for first, last in program.loops
  ]
  matmuls, mxu_cycles = _matmuls(listing, chip, counts)
  return Schedule(
    kernel=listing.name,
    chip=chip.name,
    cycles=slowest.cycles,
    stall_cycles=sum(slowest.stalls.values(), 0.0),
    cores=sum(r.cycles >= _IDLE * slowest.cycles for r in runs),
    bytes_read=sum(r.bytes['hbm_read'] for r in runs),
    bytes_written=sum(r.bytes['hbm_write'] for r in runs),
    slots=_slot_shares(listing, counts, slowest.cycles),
    mxu_busy=mxu_cycles / (chip.num_mxus * slowest.cycles),
    matmuls=matmuls,
    loops=tuple(sorted(loops, key=lambda loop: -loop.cycles)),
    stalls=tuple(sorted(slowest.stalls.items(), key=lambda x: -x[1])),
    transfers=tuple(sorted(slowest.transfers.items())),
  )


def _slot_shares(listing, counts, cycles):
  slots = listing.slots
  if slots is None or len(slots.used) != len(listing.bundles):
    return {}
  used = np.array(counts) @ np.array(slots.used)
  return {
    name: float(u / (capacity * cycles))
    for name, capacity, u in zip(slots.names, slots.capacity, used, strict=True)
  }


def _matmuls(listing, chip, counts):
  """Products by type, and the cycles they hold MXUs for."""
  found, cycles = {}, 0
  for bundle, count in zip(listing.bundles, counts, strict=True):
    for i in bundle:
      if count and i.opcode.startswith('vmatmul'):
        is_wide = _NARROW.search(i.opcode) is None
        cycles += count * chip.matmul_cycles[is_wide]
        name = _UNIT_OF_MATMUL.sub('', i.opcode)
        found[name] = found.get(name, 0) + count
  return found, cycles
