"""Executes a translated kernel on a clock, one cycle per bundle.

Every bounds check that the compiler put in is evaluated: a wrong address or a
misread instruction stops the run.
"""

from collections import defaultdict
import dataclasses
import operator
import time

from pallas_kernels.tpu_compiler import values
from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.dma import DmaEngine
from pallas_kernels.tpu_compiler.dma import Semaphores
from pallas_kernels.tpu_compiler.listing import Listing
from pallas_kernels.tpu_compiler.placement import Placement
from pallas_kernels.tpu_compiler.program import Program
from pallas_kernels.tpu_compiler.values import ScheduleError
from pallas_kernels.tpu_compiler.values import Unknown
from pallas_kernels.tpu_compiler.values import UnknownInstructionError

# A semaphore of the chip's other core: its number in the low bits, above it
# the core, a marker and the chip.
_FLAG_BITS = 14
_OTHER_CORE = 0b10
_ROUTES = {
  'general': 'hbm_read',
  'hbm_to_hbm': 'hbm_both',
  'hbm_to_smem': 'hbm_read',
  'hbm_to_vmem': 'hbm_read',
  'smem_to_hbm': 'hbm_write',
  'smem_to_smem': 'local',
  'smem_to_vmem': 'local',
  'vmem_to_hbm': 'hbm_write',
  'vmem_to_smem': 'local',
  'vmem_to_vmem': 'local',
}
_TO_SMEM = {'hbm_to_smem', 'vmem_to_smem', 'smem_to_smem'}
_RELATIONS = {
  name: getattr(operator, name) for name in ('eq', 'ge', 'gt', 'le', 'lt', 'ne')
}
_BLOCKS_BETWEEN_CHECKS = 1 << 16


@dataclasses.dataclass
class Transfer:
  """What one copy instruction has moved.

  Attributes:
    kind: 'hbm_to_vmem'.
    count: How often it ran.
    bytes: In all.
  """

  kind: str
  count: int = 0
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Execution:
  """One core's run.

  Attributes:
    cycles: Of all of it.
    stalls: Cycles spent waiting, by bundle.
    transfers: By bundle.
    bytes: By route, see `DmaEngine`.
    bundle_counts: How often each bundle was executed.
    block_counts: (first bundle, bundles, times) of each block.
  """

  cycles: float
  stalls: dict[int, float]
  transfers: dict[int, Transfer]
  bytes: dict[str, int]
  bundle_counts: tuple[int, ...]
  block_counts: tuple[tuple[int, int, int], ...]


def execute(
  listing: Listing,
  program: Program,
  placement: Placement,
  chip: Chip,
  dma: DmaEngine,
  *,
  max_seconds: float = 300.0,
) -> Execution:
  """Runs a kernel from its first bundle to its last.

  Args:
    listing: The kernel.
    program: Its translation.
    placement: Its memory; scalar memory is changed.
    chip: Gives the unit of copies.
    dma: The core's copies.
    max_seconds: Of this machine's time.

  Raises:
    ScheduleError: A failed bounds check, a wait for ever, or `max_seconds`
      passed.
    UnknownValueError: Control flow needs an operand's value.
  """
  return _Machine(listing, program, placement, chip, dma).run(max_seconds)


class _Machine:
  """State and functions of one run."""

  def __init__(self, listing, program, placement, chip, dma):
    self._listing = listing
    self._program = program
    self._placement = placement
    self._smem = placement.smem
    self._granule = chip.granule
    self._dma = dma
    self._semaphores = Semaphores()
    self._stalls = defaultdict(float)
    self._transfers = {}

  def run(self, max_seconds):
    counts = [0] * len(self._program.blocks)
    scope = {
      name: Unknown(f'register {name}, read before it was written')
      for name in self._program.registers
    }
    scope |= values.FUNCTIONS
    scope |= dict(
      COUNTS=counts,
      CORE_QUEUE=[],
      OPERANDS=self._placement.pointers,
      T=0.0,
      Unknown=Unknown,
      copy=self._copy,
      divide=_divide,
      halt=self._halt,
      load=self._load,
      reset=self._reset,
      semaphore_value=self._semaphore_value,
      signal=self._signal,
      signal_other_core=self._signal_other_core,
      store=self._store,
      wait=self._wait,
    )
    name = self._listing.name
    exec(compile(self._program.source, name, 'exec'), scope)
    blocks = [scope[f'block_{k}'] for k in range(len(counts))]
    started, steps, block = time.monotonic(), 0, 0
    while block is not None:
      block = blocks[block]()
      steps += 1
      if steps % _BLOCKS_BETWEEN_CHECKS == 0:
        if time.monotonic() - started > max_seconds:
          raise ScheduleError(
            f'{name}: {scope["T"]:,.0f} cycles took more than {max_seconds:g} s'
          )
    return self._execution(scope['T'], counts)

  def _execution(self, cycles, counts):
    bundle_counts = [0] * len(self._listing.bundles)
    for (start, length), count in zip(
      self._program.blocks, counts, strict=True
    ):
      for address in range(start, start + length):
        bundle_counts[address] += count
    return Execution(
      cycles=cycles,
      stalls=dict(self._stalls),
      transfers=self._transfers,
      bytes=self._dma.bytes,
      bundle_counts=tuple(bundle_counts),
      block_counts=tuple(
        (start, length, count)
        for (start, length), count in zip(
          self._program.blocks, counts, strict=True
        )
      ),
    )

  def _text(self, address, opcode):
    bundle = self._listing.bundles[address]
    return next(i.text for i in bundle if i.opcode.startswith(opcode))

  def _load(self, address):
    try:
      return self._smem[address]
    except KeyError:
      return Unknown(f'word {address:#x} of SMEM, never written')
    except TypeError:  # An unknown address has no hash.
      return address

  def _store(self, address, value):
    self._smem[operator.index(address)] = value

  def _wait(self, relation, semaphore, amount, now, address):
    compare, amount = _RELATIONS[relation], values.signed(amount)
    end = self._semaphores.wait(
      semaphore,
      now,
      lambda value: compare(value, amount),
      f'{self._listing.name}: bundle {address:#x}',
    )
    if end > now:
      self._stalls[address] += end - now
    return end

  def _signal(self, semaphore, amount, now):
    value = self._semaphores.value(semaphore, now)
    self._semaphores.set(semaphore, value + values.signed(amount), now)

  def _signal_other_core(self, target, amount, now, address):
    # The barrier at the start: both cores execute the same instructions in the
    # same cycles, so what this one sends is what it gets.
    flag = target & ((1 << _FLAG_BITS) - 1)
    if target >> _FLAG_BITS != _OTHER_CORE | (1 - self._placement.core):
      raise UnknownInstructionError(
        f'{self._listing.name}: a signal to another chip at {address:#x} is '
        f'not modelled: {self._text(address, "vsyncadd")}'
      )
    self._signal(flag, amount, now)

  def _reset(self, semaphore, now):
    self._semaphores.set(semaphore, 0, now)

  def _semaphore_value(self, semaphore, now):
    return self._semaphores.value(semaphore, now) & values.MASK

  def _halt(self, address):
    raise ScheduleError(
      f'{self._listing.name}: the bounds check at {address:#x} failed, so the '
      f'values given or the execution are wrong: {self._text(address, "shalt")}'
    )

  def _copy(self, kind, now, source, target, size, semaphore, address):
    route = self._route(kind, address)
    num_bytes = operator.index(size) * self._granule
    semaphore = operator.index(semaphore)
    end = self._dma.start(now, num_bytes, route)
    self._semaphores.add_at(semaphore, end, size)
    transfer = self._transfers.setdefault(address, Transfer(kind))
    transfer.count += 1
    transfer.bytes += num_bytes
    if kind in _TO_SMEM:
      self._copy_to_smem(kind, source, target, num_bytes // 4, address)

  def _route(self, kind, address):
    route = _ROUTES.get(kind.partition('.')[0])
    if route is None:
      raise UnknownInstructionError(
        f'{self._listing.name}: a copy at {address:#x} is not modelled: '
        f'{self._text(address, "dma")}'
      )
    return route

  def _copy_to_smem(self, kind, source, target, words, address):
    space = kind.partition('_')[0]
    unit = 4 if space == 'smem' else self._granule
    region = self._placement.find(space, source * unit)
    if region is not None and region.words is not None:
      start = (source * unit - region.start) // 4
      image = region.words[start : start + words].tolist()
      self._smem.update(enumerate(image, target))
      return
    if space == 'smem':
      for k in range(words):
        if source + k in self._smem:
          self._smem[target + k] = self._smem[source + k]
      return
    origin = 'memory of no operand'
    if region is not None:
      o = region.operand
      origin = f'operand {o.index}, {o.shape}, whose values were not given'
    unknown = Unknown(f'SMEM that bundle {address:#x} fills from {origin}')
    self._smem.update((target + k, unknown) for k in range(words))


def _divide(a, b, kind):
  results = [op for op in ('Div', 'Rem') if op in kind]
  if isinstance(a, Unknown) or isinstance(b, Unknown):
    why = a if isinstance(a, Unknown) else b
    return [why] * len(results)
  if b == 0:
    return [Unknown(f'{a} divided by zero')] * len(results)
  return [a // b if op == 'Div' else a % b for op in results]
