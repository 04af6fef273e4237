"""Communication between devices in a compiled HLO module."""

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import math
import re

import numpy as np

from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler.hlo import Program
from pallas_kernels.tpu_compiler.network import Network

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
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
    milliseconds: One run takes over the chip's links, see `Network`; 0 where
      the devices' places are not known.
    parts: Instructions of the schedule from its start to its end; one if it
      is not split.
  """

  name: str
  op: str
  bytes: int
  count: int
  axes: tuple[str, ...]
  groups: tuple[tuple[int, ...], ...]
  asynchronous: bool
  milliseconds: float = 0.0
  parts: tuple[str, ...] = ()

  @property
  def where(self) -> str:
    """The axes in words."""
    size = max(map(len, self.groups), default=0)
    return '+'.join(self.axes) or f'{len(self.groups)} groups of {size}'

  def report(self) -> str:
    """One line."""
    how = 'asynchronous' if self.asynchronous else 'exposed'
    time = f' of {self.milliseconds:.3f} ms' if self.milliseconds else ''
    return (
      f'{self.op} over {self.where}: {self.bytes:,} bytes x {self.count}'
      f'{time}, {how} ({self.name})'
    )


def summary(
  collectives: Iterable[Collective],
  exposed_ms: Mapping[str, float] | None = None,
) -> list[str]:
  """Lines with the collectives of one kind together, most bytes first.

  Args:
    collectives: All of them.
    exposed_ms: For how long nothing else runs, by name, where it is known.
  """
  totals = {}
  for c in collectives:
    how = 'asynchronous' if c.asynchronous else 'exposed'
    key = c.op, '+'.join(c.axes) or 'no axis', how
    total = totals.setdefault(key, [0, 0, 0.0, 0.0])
    total[0] += c.count
    total[1] += c.count * c.bytes
    total[2] += c.count * c.milliseconds
    total[3] += (exposed_ms or {}).get(c.name, 0.0)
  lines = []
  for (op, axes, how), (count, size, ms, waited) in sorted(
    totals.items(), key=lambda item: -item[1][1]
  ):
    time = f', {ms:.2f} ms' if ms else ''
    if exposed_ms is not None:
      time += f', {waited:.2f} ms exposed'
    lines.append(f'{op} over {axes}, {how}: {count:,} x, {size:,} bytes{time}')
  return lines


def find(
  program: Program,
  mesh_axes: Mapping[str, int],
  network: Network | None = None,
) -> list[Collective]:
  """Finds the collectives of a program, in the order of its text.

  Args:
    program: The module.
    mesh_axes: Names and sizes of the mesh's axes, in its order.
    network: Tells how long they take.

  Raises:
    ValueError: Groups of devices in a notation that is not known.
  """
  fused = _callers(program)
  dones = _dones(program)
  found = {}
  for computation, names in program.computations.items():
    for name in names:
      text = program.instructions[name]
      opcode = hlo.opcode_of(text)
      op = opcode.removesuffix('-start')
      if op not in COLLECTIVES:
        continue
      if computation.startswith('all-reduce-scatter'):
        op = 'reduce-scatter'  # A fusion that cuts what it sums.
      groups = _groups(text, math.prod(mesh_axes.values()))
      caller, beside = fused.get(computation, (name, False))
      size = _bytes(program, text, opcode)
      time = 0.0 if network is None else network.milliseconds(op, size, groups)
      one = Collective(
        name=name,
        op=op,
        bytes=size,
        count=program.run_counts.get(computation, 1),
        axes=_axes(groups, mesh_axes, op == 'collective-permute'),
        groups=groups,
        asynchronous=opcode.endswith('-start') or beside,
        milliseconds=time,
        parts=(caller, dones[caller]) if caller in dones else (caller,),
      )
      # XLA spreads one collective over fusions: the start, other work during
      # which it goes on, the end. All carry its channel.
      channel = _CHANNEL.search(text)
      is_part = computation in fused and channel is not None
      key = (op, channel[1]) if is_part else name
      found[key] = _joined(found[key], one) if key in found else one
  return list(found.values())


def live_bytes(program: Program, collectives: Iterable[Collective]) -> int:
  """Most HBM that results of collectives take at once.

  A result lives from its start to its last use in the computation that holds
  it; what loops and calls inside hold comes on top.
  """
  results = {}
  for c in collectives:
    results[c.parts[0]] = c.parts
  largest: dict[str, int] = {}

  def peak(computation):
    if computation in largest:
      return largest[computation]
    names = program.computations[computation]
    ends = _last_uses(program, names)
    live, most, dying = 0, 0, {}
    for name in names:
      text = program.instructions[name]
      inside = max(
        (peak(c) for c, _ in hlo.calls(text) if c in program.computations),
        default=0,
      )
      if name in results:
        result = program.instructions[results[name][-1]]
        size = hlo.array_bytes(hlo.result_of(result), hbm_only=True)
        live += size
        end = ends.get(results[name][-1], name)
        dying[end] = dying.get(end, 0) + size
      most = max(most, live + inside)
      live -= dying.pop(name, 0)
    largest[computation] = most
    return most

  return peak(program.entry)


def _last_uses(program, names):
  """Last instruction that reads each, through what only renames it."""
  last, alias = {}, {}
  for name in names:
    text = program.instructions[name]
    operands = hlo.operands_of(text)
    for operand in operands:
      while operand:
        last[operand] = name
        operand = alias.get(operand)
    if hlo.opcode_of(text) in ('bitcast', 'get-tuple-element') and operands:
      alias[name] = operands[0]
  return last


def _joined(a, b):
  """One collective out of two parts of it."""
  return dataclasses.replace(
    a,
    count=min(a.count, b.count),
    asynchronous=True,
    parts=(*a.parts, *b.parts),
  )


def _callers(program):
  """Caller of each fused computation, and if it runs beside other work."""
  found = {}
  for name, text in program.instructions.items():
    opcode = hlo.opcode_of(text)
    for callee, how in hlo.calls(text):
      if how == 'calls':
        beside = opcode == 'async-start' or 'async_collective' in callee
        found[callee] = name, beside
  return found


def _dones(program):
  """The instruction that ends what another one has started, by its name."""
  found = {}
  for name, text in program.instructions.items():
    if hlo.opcode_of(text).endswith('-done'):
      for operand in hlo.operands_of(text):
        found[operand] = name
  return found


def _bytes(program, text, opcode):
  """The larger of operands and results; a -start's result holds both."""
  types = [program.instructions.get(n, '') for n in hlo.operands_of(text)]
  given = sum(hlo.array_bytes(hlo.result_of(t)) for t in types)
  result = hlo.result_of(text)
  if opcode.endswith('-start'):
    # Also 'u32[]', counters that are not sent.
    return max(given, hlo.array_bytes(result.replace('u32[]', '')) - given)
  return max(given, hlo.array_bytes(result))


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
