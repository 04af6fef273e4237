"""Parses a listing of bundles into instructions.

A line is a bundle, its instructions separated by ';;':

    0x7 : { %221 = shalt.err (!%p218_p4) /* a comment,
    over lines */  ;;  %s9_s1 = smov.u32 (%p1_p0, %s2_s3), 4 }

`%s9_s1` is value 9, in scalar register 1. `(!%p)` predicates an instruction;
`(%p, x), y` is y where p, else x. `[smem:[#allocation3 + %s1_s2]]` is a place.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import re

from pallas_kernels.tpu_compiler.values import ScheduleError

_BUNDLE = re.compile(
  r'^ *(0x[0-9a-f]+|0)\s+(?:[A-Z]{2}:?\s*)*:?\s*(?:> ?)*\s*\{(.*)\}\s*$'
)
_MAYBE_BUNDLE = re.compile(r'^ *(0x[0-9a-f]+|0) .*[{}]')
_ASSIGNMENT = re.compile(r'^((?:%[\w.]+(?:, )?)+) = (.*)$')
# '(!1)' and '(0),' are never.
_PREDICATE = re.compile(
  r'\((!?)%?((?<=%)p\w+|(?<=!)1|(?<=\()0(?=\),))(?:, ([^()]*))?\)(,?)'
)
_STORE = re.compile(r'^(\[\w+:\[[^\]]*(?:\[[^\]]*\][^\]]*)*\]\])[\s,]*')
_ALLOCATION = re.compile(
  r"\s*#(\w+) \[shape = '[^']*', space=(\w+), size = (?:0x[0-9a-f]+|\d+)"
  r'(?:, offset = (0x[0-9a-f]+|\d+))?(.*)'
)
_OPERAND = re.compile(
  r'inlined_call_operand\.(<no memory space>|\w+) '
  r'\[shape: (\S+), index: (\d+), kind: (\w+)'
)
# Allocations without an offset are put behind all others.
_NO_OFFSET = 0x80000


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
  """One instruction of a bundle.

  Attributes:
    address: Number of its bundle.
    text: As listed, without comments.
    opcode: 'sadd.s32'.
    results: Names it defines, without '%'.
    args: Operands by position.
    keywords: Operands by name.
    predicate: Name of the predicate it depends on.
    negated: It runs where the predicate is false.
    fallback: For a select, what it gives where the predicate is false.
  """

  address: int
  text: str
  opcode: str
  results: tuple[str, ...]
  args: tuple[str, ...]
  keywords: dict[str, str]
  predicate: str | None
  negated: bool
  fallback: str | None

  @property
  def name(self) -> str:
    """The opcode without its types: 'sadd'."""
    return self.opcode.partition('.')[0]


@dataclasses.dataclass(frozen=True)
class Allocation:
  """A piece of memory that the compiler has placed.

  Attributes:
    space: 'vmem', 'smem', 'sflag' or 'hbm'.
    offset: Bytes from the start of its scope.
    is_absolute: Its offset is from the start of the memory.
    tag: What the compiler says it is.
  """

  space: str
  offset: int
  is_absolute: bool
  tag: str


@dataclasses.dataclass(frozen=True)
class Operand:
  """An operand of the kernel.

  Attributes:
    result: Name that holds its address, or its value.
    space: 'hbm', 'vmem', 'smem', or '<no memory space>' for a value.
    shape: 'bf16[16,128]'.
    index: Position in the custom call; inputs and outputs count apart.
    is_input: Whether it is read.
  """

  result: str
  space: str
  shape: str
  index: int
  is_input: bool


@dataclasses.dataclass(frozen=True)
class Slots:
  """Use of the slots of a bundle.

  Attributes:
    names: 'MATMUL', 'VALU', 'VSTORE:SPILL', ...
    capacity: Of each, per bundle.
    used: Of each, for every bundle.
  """

  names: tuple[str, ...]
  capacity: tuple[int, ...]
  used: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Listing:
  """A kernel.

  Attributes:
    name: For messages.
    bundles: Instructions by address.
    allocations: By name, without '#'.
    slots: Their use, or `None` where it was not dumped.
  """

  name: str
  bundles: tuple[tuple[Instruction, ...], ...]
  allocations: dict[str, Allocation]
  slots: Slots | None

  @property
  def operands(self) -> list[Operand]:
    """Operands, inputs first, by index."""
    found = []
    for bundle in self.bundles:
      for i in bundle:
        if i.opcode.startswith('inlined_call_operand'):
          match = _OPERAND.search(i.text)
          if match is None:
            raise ScheduleError(f'{self.name}: operand not understood: {i}')
          space, shape, index, kind = match.groups()
          found.append(
            Operand(
              i.results[0],
              space,
              shape.rstrip(','),
              int(index),
              kind == 'input',
            )
          )
    return sorted(found, key=lambda o: (not o.is_input, o.index))


def read(
  name: str,
  listing: pathlib.Path,
  allocations: pathlib.Path | None,
  slots: pathlib.Path | None,
) -> Listing:
  """Reads the files of a kernel; see `dump.KernelFiles`."""
  text = lambda path: '' if path is None else path.read_text(errors='replace')
  return parse(name, text(listing), text(allocations), text(slots))


def parse(
  name: str, listing: str, allocations: str = '', slots: str = ''
) -> Listing:
  """Parses the texts of a kernel.

  Raises:
    ScheduleError: No bundles, or a line that is not understood.
  """
  bundles = []
  for line in _without_comments(name, listing).split('\n'):
    match = _BUNDLE.match(line)
    if match is None:
      if _MAYBE_BUNDLE.match(line):
        raise ScheduleError(f'{name}: bundle not understood: {line}')
      continue
    address = int(match[1], 16)
    if address != len(bundles):
      raise ScheduleError(f'{name}: bundle {address:#x} is out of order')
    texts = filter(None, (t.strip() for t in match[2].split(';;')))
    bundles.append(tuple(parse_instruction(t, address) for t in texts))
  if not bundles:
    raise ScheduleError(f'{name}: the listing has no bundles')
  return Listing(
    name, tuple(bundles), _parse_allocations(allocations), _parse_slots(slots)
  )


def parse_instruction(text: str, address: int = 0) -> Instruction:
  """Parses one instruction without comments."""
  match = _ASSIGNMENT.match(text)
  results = match[1].split(',') if match else []
  opcode, _, rest = (match[2] if match else text).partition(' ')
  predicate, negated, fallback = None, False, None
  if match := _PREDICATE.search(rest):
    negated, predicate, fallback = match[1] == '!', match[2], match[3]
    before = rest[: match.start()]
    comma = ',' if match[4] and before.rstrip().endswith(']') else ''
    rest = before + comma + rest[match.end() :]
  rest = re.sub(r'\[(?:thread|resolvable):\$\w+\]', '', rest)
  if opcode == 'sst':
    rest = _STORE.sub(r'\1, ', rest.strip())
  args, keywords = [], {}
  for arg in split_operands(rest):
    keyword, equals, value = arg.partition('=')
    if equals and keyword.isidentifier():
      keywords[keyword] = value.strip()
    else:
      args.append(arg)
  return Instruction(
    address,
    text,
    opcode,
    tuple(r.strip()[1:] for r in results),
    tuple(args),
    keywords,
    predicate,
    negated,
    fallback,
  )


def split_operands(text: str) -> list[str]:
  """Splits at commas outside of brackets."""
  parts, depth, start = [], 0, 0
  for i, c in enumerate(text):
    depth += (c in '[(') - (c in '])')
    if c == ',' and depth == 0:
      parts.append(text[start:i])
      start = i + 1
  return [p.strip() for p in (*parts, text[start:]) if p.strip()]


def _without_comments(name, text):
  # Names of operands, and which results a division gives, are in comments.
  text = re.sub(r'/\*(\w+)=\*/', r'\1=', text)
  text = re.sub(r'(sdivrem[^/;}]*?)\s*/\* (k\w+) \*/', r'\1, kind=\2', text)
  kept, depth = [], 0
  # libtpu 0.0.42 quotes the instruction a check is for, with its comments.
  for part in re.split(r'(/\*|\*/)', text):
    if part == '/*':
      depth += 1
    elif part == '*/':
      depth -= 1
    elif depth == 0:
      kept.append(part)
    if depth < 0:
      raise ScheduleError(f'{name}: a comment ends that did not begin')
  if depth:
    raise ScheduleError(f'{name}: a comment does not end')
  return ''.join(kept)


def _parse_allocations(text):
  found = {}
  for line in text.splitlines():
    if match := _ALLOCATION.match(line):
      name, space, offset, rest = match.groups()
      tag = re.search(r"tag = '([^']*)", rest)
      found[name] = Allocation(
        space,
        int(offset, 0) if offset else _NO_OFFSET + 0x100 * len(found),
        'fixed_abs' in rest,
        tag[1] if tag else '',
      )
  return found


def _parse_slots(text):
  lines: Sequence[str] = text.split('\n')
  if len(lines) < 5:
    return None
  rows = (tuple(map(int, line.split())) for line in lines[4:] if line.strip())
  return Slots(
    tuple(name.strip() for name in lines[1].split(',')),
    tuple(map(int, lines[2].split())),
    tuple(rows),
  )
