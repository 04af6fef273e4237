"""Basic blocks of a listing, each translated to a Python function.

A block runs from a branch's target to the delay slots of the next branch. A phi
is the last executed definition among its operands: that is what the physical
register they share holds.
"""

import dataclasses
import re

from pallas_kernels.tpu_compiler import instructions
from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.listing import Listing
from pallas_kernels.tpu_compiler.listing import split_operands
from pallas_kernels.tpu_compiler.values import ScheduleError
from pallas_kernels.tpu_compiler.values import UnknownInstructionError

VMEM_UNIT = 512  # Bytes of one step of an address; semaphores and SMEM: 4.
# Where allocations that are relative to a scope begin, in those steps.
_SCOPE_START = {'smem': 0x1000, 'sflag': 0x100, 'vmem': 0x1000}
_UNIT = {'smem': 4, 'sflag': 4, 'vmem': VMEM_UNIT}
_HBM_START = 1 << 19
_TARGET = re.compile(r'target bundleno = (\d+)')


@dataclasses.dataclass(frozen=True)
class Program:
  """A translated listing.

  Attributes:
    blocks: First bundle and number of bundles of each block.
    source: Python functions `block_0`, `block_1`, ...; each adds its cycles to
      `T` and returns the number of the next, or `None` at the end.
    registers: Names that the source assigns.
    loops: First and last bundle of each loop.
  """

  blocks: tuple[tuple[int, int], ...]
  source: str
  registers: frozenset[str]
  loops: tuple[tuple[int, int], ...]


def translate(listing: Listing, chip: Chip) -> Program:
  """Translates a listing for the machine to execute.

  Raises:
    UnknownInstructionError: With the instruction's text.
    ScheduleError: An allocation or a branch that is not understood.
  """
  return _ProgramWriter(listing, chip).program()


def branches(listing: Listing) -> dict[int, int]:
  """Targets of the branches, by the bundle they are in.

  Raises:
    UnknownInstructionError: A branch that is not to a fixed bundle.
  """
  found = {}
  for address, bundle in enumerate(listing.bundles):
    for i in bundle:
      if i.name == 'sbr':
        match = _TARGET.search(i.text)
        if i.opcode != 'sbr.rel' or match is None or address in found:
          raise UnknownInstructionError(f'the branch at {address:#x}: {i.text}')
        found[address] = int(match[1])
  return found


class _ProgramWriter:
  """Translates one listing."""

  def __init__(self, listing, chip):
    self._listing = listing
    self._chip = chip
    self._branches = branches(listing)
    slots = chip.delay_slots
    size = len(listing.bundles)
    starts = {0, *self._branches.values()}
    starts |= {address + slots + 1 for address in self._branches}
    self._starts = sorted(s for s in starts if s < size)
    self._number = {start: k for k, start in enumerate(self._starts)}
    every = [i for bundle in listing.bundles for i in bundle]
    self._phis_of = {}
    for i in every:
      if i.opcode == 'sphi':
        for name in split_operands(i.text.partition(' sphi ')[2]):
          self._phis_of.setdefault(name[1:], []).append(i.results[0])
    self._translator = instructions.Translator(
      self._allocation,
      frozenset(
        i.results[0] for i in every if instructions.is_vector_constant(i)
      ),
    )

  def program(self):
    self._check_delay_slots()
    blocks, functions, registers = [], [], set()
    for number, start in enumerate(self._starts):
      self._translator.assigned = {'T'}
      lines, length = self._block(start)
      assigned = sorted(self._translator.assigned)
      registers.update(assigned)
      head = f'COUNTS[{number}] += 1'
      body = '\n'.join(f'  {line}' for line in [head, *lines])
      functions.append(
        f'def block_{number}():\n  global {", ".join(assigned)}\n{body}\n'
      )
      blocks.append((start, length))
    return Program(
      tuple(blocks),
      '\n'.join(functions),
      frozenset(registers - {'T'}),
      tuple(
        (target, address + self._chip.delay_slots)
        for address, target in self._branches.items()
        if target <= address
      ),
    )

  def _check_delay_slots(self):
    addresses = sorted(self._branches)
    for first, second in zip(addresses, addresses[1:], strict=False):
      if second - first <= self._chip.delay_slots:
        raise UnknownInstructionError(
          f'the branch at {second:#x} is in the delay slots of that at '
          f'{first:#x}'
        )

  def _block(self, start):
    """Lines and number of bundles of the block at `start`."""
    bundles, lines = self._listing.bundles, []
    branch, address = None, start
    while address < len(bundles):
      if address != start and address in self._number and branch is None:
        break
      lines += self._bundle(bundles[address], address - start)
      if address in self._branches:
        branch = address
        lines.append(f'taken = {self._condition(bundles[address])}')
      address += 1
      if branch is not None and address == branch + self._chip.delay_slots + 1:
        break
    following = self._number.get(address)
    if branch is not None:
      target = self._number.get(self._branches[branch])
      following = f'{target} if taken else {following}'
    return [
      *lines,
      f'T += {address - start}',
      f'return {following}',
    ], address - start

  def _condition(self, bundle):
    branch = next(i for i in bundle if i.name == 'sbr')
    if branch.predicate is None:
      return 'True'
    return f'{"not" if branch.negated else "bool"}({branch.predicate})'

  def _bundle(self, bundle, offset):
    """Python of one bundle; everything in it happens at once."""
    lines, phis = [], [i.results[0] for i in bundle if i.opcode == 'sphi']
    # All phis are read before any is written.
    for k, name in enumerate(phis):
      self._translator.assigned.add(f'phi_{name}')
      lines.append(f'phi{k} = phi_{name}')
    for k, name in enumerate(phis):
      lines.append(self._translator.assign(name, f'phi{k}'))
      lines += self._feeds(name)
    rest = [i for i in bundle if i.opcode != 'sphi' and i.name != 'sbr']
    for i in _in_order(rest):
      translated = self._translator.lines(i, offset)
      if not translated or not i.results:
        lines += translated
        continue
      feeds = self._feeds(i.results[0])
      unconditional = i.predicate is None or i.fallback is not None
      indent = '' if unconditional else '  '
      lines += [*translated, *(f'{indent}{line}' for line in feeds)]
    return lines

  def _feeds(self, name):
    """Lines that make `name` the last definition of the phis it is in."""
    return [
      self._translator.assign(f'phi_{phi}', name)
      for phi in self._phis_of.get(name, ())
    ]

  def _allocation(self, name):
    """Address of an allocation, in steps of its memory."""
    allocation = self._listing.allocations.get(name)
    if allocation is None:
      raise ScheduleError(
        f'{self._listing.name}: the dump says nothing of #{name}'
      )
    if allocation.space == 'hbm':
      return (_HBM_START + allocation.offset) // self._chip.hbm_unit
    start = 0 if allocation.is_absolute else _SCOPE_START[allocation.space]
    return start + allocation.offset // _UNIT[allocation.space]


def _in_order(bundle):
  """Definitions before the uses that the listing means; stores last."""
  definitions = {name: i for i in bundle for name in i.results}
  order, seen = [], set()

  def visit(i, above):
    if id(i) in seen or id(i) in above:
      return
    used = re.findall(r'%(\w+)', i.text.split(' = ', 1)[-1])
    for name in dict.fromkeys(used):
      if name in definitions and definitions[name] is not i:
        visit(definitions[name], (*above, id(i)))
    if id(i) not in seen:
      seen.add(id(i))
      order.append(i)

  for i in sorted(bundle, key=lambda i: i.opcode == 'sst'):
    visit(i, ())
  return order
