"""Reads a compiled HLO module's text: instructions, kernels, layouts."""

from collections.abc import Iterator
import dataclasses
import re

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%(\S+) = (.*)$')
# A type is an array's or a tuple's; tuples of tuples have '(' inside.
_OPCODE = re.compile(r'(?<=[\s)}\]])([a-z][a-z0-9\-]*)\(')
_LAYOUT = re.compile(r'\w+\[[\d,]*\](?:\{([\d,]*)(?::([^}]*))?\})?')


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
