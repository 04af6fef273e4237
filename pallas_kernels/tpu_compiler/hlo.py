"""Reads a compiled HLO module's text: instructions, kernels, layouts."""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%(\S+) = (.*)$')
# A type is an array's or a tuple's; tuples of tuples have '(' inside.
_OPCODE = re.compile(r'(?<=[\s)}\]])([a-z][a-z0-9\-]*)\(')
_LAYOUT = re.compile(r'\w+\[[\d,]*\](?:\{([\d,]*)(?::([^}]*))?\})?')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Memory spaces other than HBM: VMEM, semaphores and scalars, the host.
_NOT_HBM = re.compile(r'S\([1-9]\d*\)')


@dataclasses.dataclass(frozen=True)
class Program:
  """An HLO module.

  Attributes:
    instructions: Text after the equals sign, by name.
    computations: Names of instructions, by computation, in order.
    entry: Name of the entry computation.
  """

  instructions: dict[str, str]
  computations: dict[str, list[str]]
  entry: str

  @functools.cached_property
  def run_counts(self) -> dict[str, int]:
    """How often each computation runs, as far as loops say their length."""
    counts = dict.fromkeys(self.computations, 0)

    def visit(computation, times):
      counts[computation] += times
      for name in self.computations[computation]:
        text = self.instructions[name]
        for callee, how in calls(text):
          if callee in counts and how != 'condition':
            known = trips(self, text) if how == 'body' else 1
            visit(callee, times * (1 if known is None else known))

    visit(self.entry, 1)
    return {name: max(n, 1) for name, n in counts.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array lies in memory: `{1,0:T(8,128)(2,1)}`.

  Attributes:
    minor_to_major: Its dimensions, the fastest first.
    tiles: Its tilings, the outermost first.
  """

  minor_to_major: tuple[int, ...]
  tiles: tuple[tuple[int, ...], ...]


def parse(text: str) -> Program:
  """Parses the text of a module.

  Raises:
    ValueError: It has no entry computation.
  """
  instructions, computations, entry = {}, {}, None
  current = []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif match := _INSTRUCTION.match(line):
      instructions.setdefault(match[1], match[2])
      current.append(match[1])
  if entry is None:
    raise ValueError('not the text of an HLO module: it has no ENTRY')
  return Program(instructions, computations, entry)


def pallas_kernels(program: Program) -> Iterator[str]:
  """Names of the Pallas calls, in program order."""
  for name, text in program.instructions.items():
    if 'custom_call_target="tpu_custom_call"' in text:
      yield name


def operand_layouts(program: Program, name: str) -> dict[int, Layout]:
  """Layouts of the operands of a kernel, by position."""
  text = program.instructions.get(name, '')
  match = re.search(r'(?:custom-call|fusion)\((.*?)\)(?:, |$)', text)
  layouts = {}
  for i, operand in enumerate(names_in(match[1]) if match else ()):
    layout = _LAYOUT.match(program.instructions.get(operand, ''))
    if layout and layout[1] is not None:
      tiled = (layout[2] or '').split('S(')[0]
      layouts[i] = Layout(
        tuple(int(d) for d in layout[1].split(',') if d),
        tuple(
          tuple(int(s) for s in tile.split(','))
          for tile in re.findall(r'T?\(([\d,]+)\)', tiled)
        ),
      )
  return layouts


def opcode_of(text: str) -> str:
  """The operation of an instruction, such as 'all-gather-start'."""
  match = _OPCODE.search(text.split(', metadata=')[0])
  return match[1] if match else ''


def names_in(arguments: str) -> list[str]:
  """Instructions that a list of operands names."""
  return re.findall(r'%([\w.\-]+)', arguments)


def operands_of(text: str) -> list[str]:
  """Names of an instruction's operands."""
  match = _OPCODE.search(text.split(', metadata=')[0])
  if match is None:
    return []
  # Types inside the parentheses may have parentheses of their own.
  depth, end = 1, match.end()
  while depth and end < len(text):
    depth += {'(': 1, ')': -1}.get(text[end], 0)
    end += 1
  return names_in(text[match.end() : end])


def result_of(text: str) -> str:
  """Type of an instruction's result."""
  match = _OPCODE.search(text.split(', metadata=')[0])
  return text[: match.start()] if match else ''


def array_bytes(types: str, *, hbm_only: bool = False) -> int:
  """Bytes of all arrays in a type; with `hbm_only` of those in HBM."""
  total = 0
  for dtype, shape, layout in _ARRAY.findall(types):
    if hbm_only and _NOT_HBM.search(layout):
      continue
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    total += math.prod(sizes_of(shape)) * bits // 8
  return total


def shape_of(text: str) -> list[int]:
  """Shape of the first array of a type or an instruction."""
  match = _ARRAY.search(text)
  return sizes_of(match[2]) if match else []


def sizes_of(text: str) -> list[int]:
  """Numbers in a list that commas separate."""
  return [int(s) for s in text.split(',') if s]


def calls(text: str) -> Iterator[tuple[str, str]]:
  """Computations that an instruction runs, and how: 'calls', 'body', ..."""
  text = text.partition(', metadata=')[0]
  yield from ((m[2], m[1]) for m in _CALLED.finditer(text))
  for match in _BRANCHES.finditer(text):
    yield from ((name, 'branch') for name in names_in(match[1]))


def trips(program: Program, loop: str) -> int | None:
  """Length of a loop: what it says, or what its counter must reach.

  A counter starts at a constant, zero if none is seen, and grows by a constant;
  `None` is the answer where there is no such counter.
  """
  if match := _TRIPS.search(loop):
    return int(match[1])
  called = {how: name for name, how in calls(loop)}
  for name in program.computations.get(called.get('condition', ''), ()):
    text = program.instructions[name]
    if opcode_of(text) != 'compare' or 'direction=LT' not in text:
      continue
    counter, limit = operands_of(text)[:2]
    end = _constant(program, limit)
    if end is None:
      continue
    index = re.search(r'\bindex=(\d+)', program.instructions.get(counter, ''))
    start, step = 0, 1
    if index:
      start = _element(program, operands_of(loop)[0], int(index[1])) or 0
      step = _growth(program, called.get('body', ''), int(index[1]))
    return max(-(-(end - start) // step), 0)
  return None


def _constant(program, name):
  match = re.search(r' constant\((-?\d+)\)', program.instructions.get(name, ''))
  return int(match[1]) if match else None


def _element(program, name, index):
  """A constant in a tuple, or `None`."""
  text = program.instructions.get(name, '')
  if opcode_of(text) != 'tuple':
    return None
  name = operands_of(text)[index]
  while opcode_of(program.instructions.get(name, '')) == 'copy':
    name = operands_of(program.instructions[name])[0]
  return _constant(program, name)


def _growth(program, body, index):
  """What a round of a loop adds to its counter."""
  names = program.computations.get(body) or ['']
  root = program.instructions.get(names[-1], '')
  if opcode_of(root) != 'tuple':
    return 1
  added = program.instructions.get(operands_of(root)[index], '')
  if opcode_of(added) != 'add':
    return 1
  steps = (_constant(program, name) for name in operands_of(added))
  return next((step for step in steps if step), 1)
