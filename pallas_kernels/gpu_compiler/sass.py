"""Loops of the machine code, and how long their instructions take to issue.

What is read is nvdisasm's listing with the scheduler's control codes in front:
`wait:read:write:yield:stall  /*address*/  instruction`.

An SM has four partitions; a warpgroup has a warp on each, so the instructions
of one warp, times the warpgroups that run the loop, are what a partition issues
at one a cycle. Exponentials and their like take 8 cycles of a partition (4
lanes: NVIDIA, "CUDA C++ Programming Guide", arithmetic throughput: 16 an SM and
cycle). A WGMMA of 64 x N x (32 bytes of K) takes N / 2 cycles of the SM's
tensor cores, which all its warpgroups share.
"""

import collections
import dataclasses
import re

_LABEL = re.compile(r'^(\.L_x_\d+):')
_LINE = re.compile(
  r'^\s*(?P<control>\S+:\S+:\S+:\S+:(?P<stall>\d+)|)\s*/\*(?P<address>[0-9a-f]+)'
  r'\*/\s+(?P<predicate>@!?U?P[T\d]+\s+)?(?P<op>[A-Z][\w.]*)(?P<rest>.*)'
)
_TARGET = re.compile(r'`\((\.L_x_\d+)\)')
_PRODUCT = re.compile(r'\.64x(\d+)x')
_MUFU_CYCLES = 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of the listing.

  Attributes:
    op: Name with its modifiers, such as 'MUFU.EX2'.
    stall: Cycles that the warp waits before its next instruction.
    target: Label that it jumps to, or ''.
    is_conditional: Whether a predicate guards it.
  """

  op: str
  stall: int
  target: str = ''
  is_conditional: bool = False

  @property
  def name(self) -> str:
    """Without modifiers."""
    return self.op.split('.')[0]


@dataclasses.dataclass(frozen=True)
class Loop:
  """Straight code between a label and a jump back to it.

  Attributes:
    instructions: Of one pass, branches not taken included.
  """

  instructions: tuple[Instruction, ...]

  @property
  def counts(self) -> collections.Counter:
    """How many of each name."""
    return collections.Counter(i.name for i in self.instructions)

  @property
  def tensor_cycles(self) -> int:
    """Of an SM's tensor cores, for one warpgroup's pass."""
    found = [_PRODUCT.search(i.op) for i in self.instructions]
    return sum(int(m.group(1)) // 2 for m in found if m)

  @property
  def issue_cycles(self) -> int:
    """Of one partition, for one warpgroup's pass."""
    return len(self.instructions)

  @property
  def mufu_cycles(self) -> int:
    """Of one partition's special function unit, for one warpgroup's pass."""
    return _MUFU_CYCLES * self.counts['MUFU']

  @property
  def tensor_share(self) -> float:
    """What the tensor cores could reach at best, all else hidden behind them.

    Each warpgroup that runs the loop adds to all three alike.
    """
    busiest = max(self.tensor_cycles, self.issue_cycles, self.mufu_cycles)
    return self.tensor_cycles / busiest if busiest else 0.0


def parse(listing: str) -> list[tuple[str, Instruction]]:
  """Instructions in order, each with the labels just before it."""
  found, labels = [], ''
  for line in listing.splitlines():
    if m := _LABEL.match(line):
      labels += m.group(1) + ' '
    elif m := _LINE.match(line):
      target = _TARGET.search(m.group('rest'))
      found.append(
        (
          labels,
          Instruction(
            m.group('op'),
            int(m.group('stall') or 0),
            target.group(1) if target else '',
            m.group('predicate') is not None,
          ),
        )
      )
      labels = ''
  return found


def loops(listing: str) -> tuple[Loop, ...]:
  """All loops, the longest first; one inside another is part of both.

  Jumps without a condition lead back from code that was moved out of the way,
  such as a wait's second try.
  """
  code = parse(listing)
  starts = {
    label: i for i, (labels, _) in enumerate(code) for label in labels.split()
  }
  found = []
  for end, (_, jump) in enumerate(code):
    start = starts.get(jump.target, end)
    if jump.name == 'BRA' and jump.is_conditional and start < end:
      found.append(Loop(tuple(i for _, i in code[start : end + 1])))
  return tuple(sorted(found, key=lambda loop: -len(loop.instructions)))
