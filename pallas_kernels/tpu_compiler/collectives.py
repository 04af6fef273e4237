"""Communication between devices in a compiled HLO module."""

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import math
import re

import numpy as np

from pallas_kernels.tpu_compiler.hlo import Program
from pallas_kernels.tpu_compiler.hlo import names_in
from pallas_kernels.tpu_compiler.hlo import opcode_of

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(
  r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}'
)
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_BY_AXES = re.compile(r'replica_groups=mesh([^{]*)\{([^{}]+)\}')
_CHANNEL = re.compile(r'\bchannel_id=(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One communication between devices.

  Attributes:
    name: Of the HLO instruction.
    op: One of `COLLECTIVES`.
    bytes: The larger of what a device gives and what it gets.
    count: How often it runs; a loop whose length nobody says counts once.
    axes: Mesh axes it goes along; empty if its groups are along none.
    groups: Devices that communicate with each other, by position in the mesh;
      (source, target) pairs of a permutation.
    asynchronous: Whether other work may run between its start and its end.
  """

  name: str
  op: str
  bytes: int
  count: int
  axes: tuple[str, ...]
  groups: tuple[tuple[int, ...], ...]
  asynchronous: bool

  def report(self) -> str:
    """One line."""
    size = max(map(len, self.groups), default=0)
    where = '+'.join(self.axes) or f'{len(self.groups)} groups of {size}'
    how = 'asynchronous' if self.asynchronous else 'exposed'
    return (
      f'{self.op} over {where}: {self.bytes:,} bytes x {self.count}, {how} '
      f'({self.name})'
    )


def summary(collectives: Iterable[Collective]) -> list[str]:
  """Lines with the collectives of one kind together, most bytes first."""
  totals = {}
  for c in collectives:
    how = 'asynchronous' if c.asynchronous else 'exposed'
    total = totals.setdefault(
      (c.op, '+'.join(c.axes) or 'no axis', how), [0, 0]
    )
    total[0] += c.count
    total[1] += c.count * c.bytes
  return [
    f'{op} over {axes}, {how}: {count:,} x, {size:,} bytes'
    for (op, axes, how), (count, size) in sorted(
      totals.items(), key=lambda item: -item[1][1]
    )
  ]


def find(program: Program, mesh_axes: Mapping[str, int]) -> list[Collective]:
  """Finds the collectives of a program, in the order of its text.

  Args:
    program: The module.
    mesh_axes: Names and sizes of the mesh's axes, in its order.

  Raises:
    ValueError: Groups of devices in a notation that is not known.
  """
  counts = _run_counts(program)
  fused = _callers(program)
  found = {}
  for computation, names in program.computations.items():
    for name in names:
      text = program.instructions[name]
      opcode = opcode_of(text)
      op = opcode.removesuffix('-start')
      if op not in COLLECTIVES:
        continue
      groups = _groups(text, math.prod(mesh_axes.values()))
      hidden = opcode != op or fused.get(computation, False)
      one = Collective(
        name=name,
        op=op,
        bytes=_bytes(program, text, opcode),
        count=counts.get(computation, 1),
        axes=_axes(groups, mesh_axes, op == 'collective-permute'),
        groups=groups,
        asynchronous=hidden,
      )
      # XLA spreads one collective over fusions: the start, other work during
      # which it goes on, the end. All carry its channel.
      channel = _CHANNEL.search(text)
      is_part = computation in fused and channel is not None
      key = (op, channel[1]) if is_part else name
      found[key] = _joined(found[key], one) if key in found else one
  return list(found.values())


def _joined(a, b):
  """One collective out of two parts of it."""
  return dataclasses.replace(a, count=min(a.count, b.count), asynchronous=True)


def _calls(text):
  """Computations that an instruction runs, and how."""
  yield from ((m[2], m[1]) for m in _CALLED.finditer(text))
  for match in _BRANCHES.finditer(text):
    yield from ((name, 'branch') for name in names_in(match[1]))


def _run_counts(program):
  """How often each computation runs, as far as loops say their length."""
  counts = {name: 0 for name in program.computations}

  def visit(computation, times):
    counts[computation] += times
    for name in program.computations[computation]:
      text = program.instructions[name]
      for callee, how in _calls(text):
        if callee in counts and how != 'condition':
          trips = _trips(program, text) if how == 'body' else 1
          visit(callee, times * trips)

  visit(program.entry, 1)
  return {name: max(n, 1) for name, n in counts.items()}


def _trips(program, loop):
  """Length of a loop: what it says, or what a counter from zero must reach."""
  if match := _TRIPS.search(loop):
    return int(match[1])
  condition = re.search(r'condition=%?([\w.\-]+)', loop)
  for name in program.computations.get(condition[1] if condition else '', ()):
    text = program.instructions[name]
    if opcode_of(text) == 'compare' and 'direction=LT' in text:
      limit = names_in(text.partition('compare(')[2].partition(')')[0])[-1]
      constant = program.instructions.get(limit, '')
      if match := re.search(r' constant\((\d+)\)', constant):
        return int(match[1])
  return 1


def _callers(program):
  """Fused computations; true for those that run a collective beside work."""
  found = {}
  for text in program.instructions.values():
    opcode = opcode_of(text)
    for callee, how in _calls(text):
      if how == 'calls':
        beside = opcode == 'async-start' or 'async_collective' in callee
        found[callee] = found.get(callee, False) or beside
  return found


def _bytes(program, text, opcode):
  """The larger of operands and results; a -start's result holds both."""
  before, _, rest = text.partition(f' {opcode}(')
  arguments = rest.split(')')[0]
  types = [program.instructions.get(n, '') for n in names_in(arguments)]
  given = sum(_array_bytes(t.split(' ')[0]) for t in types)
  if opcode.endswith('-start'):
    # Also 'u32[]', counters that are not sent.
    return max(given, _array_bytes(before.replace('u32[]', '')) - given)
  return max(given, _array_bytes(before))


def _array_bytes(types):
  total = 0
  for dtype, shape in _ARRAY.findall(types):
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    sizes = [int(s) for s in shape.split(',') if s]
    total += math.prod(sizes) * bits // 8
  return total


def _groups(text, num_devices):
  """Groups of positions in the mesh, or source-target pairs."""
  if match := _LISTED.search(text):
    return tuple(
      tuple(int(i) for i in group.split(','))
      for group in re.findall(r'\{([\d,]+)\}', match[1])
    )
  if match := _IOTA.search(text):
    shape = [int(i) for i in match[1].split(',')]
    return _rows(_iota(*match.group(2, 3)).reshape(shape))
  if match := _BY_AXES.search(text):
    return _groups_of_axes(*match.groups())
  if 'replica_groups=' in text and 'replica_groups={}' not in text:
    raise ValueError(f'groups of devices not understood: {text[:400]}')
  return (tuple(range(num_devices)),)


def _groups_of_axes(mesh, axes):
  """Groups along axes of a mesh that the instruction spells out."""
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  if match := re.search(r'device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)', mesh):
    ids = _iota(*match.groups())
  elif match := re.search(r'device_ids=\(([\d,]+)\)', mesh):
    ids = np.array([int(i) for i in match[1].split(',')])
  names = [name.strip().strip("'") for name in axes.split(',')]
  if unknown := [name for name in names if name not in sizes]:
    raise ValueError(f'groups along {unknown} of mesh{mesh} not understood')
  along = [list(sizes).index(name) for name in names]
  across = [i for i in range(len(sizes)) if i not in along]
  grid = ids.reshape(tuple(sizes.values())).transpose(*across, *along)
  return _rows(grid.reshape(-1, math.prod(sizes[name] for name in names)))


def _iota(shape, order):
  """`[4,2]T(1,0)`: consecutive numbers in a shape, then transposed."""
  sizes = [int(i) for i in shape.split(',')]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  axes = [int(i) for i in order.split(',')] if order else range(len(sizes))
  return ids.transpose(axes)


def _rows(ids):
  return tuple(map(tuple, ids.tolist()))


def _axes(groups, mesh_axes, is_permutation):
  """The fewest mesh axes that the groups are along."""
  sizes = tuple(mesh_axes.values())
  grid = np.arange(math.prod(sizes)).reshape(sizes)
  used = {frozenset(group) for group in groups}
  real = [i for i, size in enumerate(sizes) if size > 1]
  names = list(mesh_axes)
  if any(i >= grid.size for group in groups for i in group):
    return ()
  if is_permutation:
    moved = np.array([np.unravel_index(g, sizes) for g in groups])
    differ = (moved[:, :, 0] != moved[:, :, 1]).any(0)
    return tuple(names[i] for i in np.flatnonzero(differ))
  for count in range(1, len(real) + 1):
    for axes in itertools.combinations(real, count):
      rest = [i for i in range(len(sizes)) if i not in axes]
      rows = grid.transpose(*rest, *axes).reshape(
        -1, math.prod(sizes[i] for i in axes)
      )
      if {frozenset(row) for row in rows.tolist()} == used:
        return tuple(names[i] for i in axes)
  return ()
