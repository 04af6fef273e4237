"""Numbers of the scalar core: 32-bit words, and words that nobody knows."""

import math
import struct

MASK = 0xFFFFFFFF
SIGN = 0x80000000


class ScheduleError(RuntimeError):
  """A schedule cannot be executed; says which instruction and why."""


class UnknownInstructionError(ScheduleError):
  """An instruction, or a form of one, that is not modelled."""


class UnknownValueError(ScheduleError):
  """Control flow, a size or an address depends on a value nobody gave."""


class Unknown:
  """A word nobody knows: arithmetic hands it on, a decision about it raises."""

  __slots__ = ('why',)
  __hash__ = None

  def __init__(self, why: str):
    self.why = why

  def _self(self, *_):
    return self

  __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _self
  __or__ = __ror__ = __xor__ = __rxor__ = _self
  __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _self

  def __and__(self, other):
    return 0 if not isinstance(other, Unknown) and other == 0 else self

  __rand__ = __and__

  def __bool__(self):
    raise UnknownValueError(
      f'control flow needs a value this run does not know: {self.why}'
    )

  def __index__(self):
    raise UnknownValueError(
      f'an address, size or count needs a value this run does not know: '
      f'{self.why}'
    )

  __int__ = __index__


def signed(word: int) -> int:
  """A word read as two's complement."""
  return word - (1 << 32) if word & SIGN else word


def float_word(x: float) -> int:
  """The word of a float32."""
  try:
    return struct.unpack('<I', struct.pack('<f', x))[0]
  except OverflowError:
    return struct.unpack('<I', struct.pack('<f', math.copysign(math.inf, x)))[0]


def _word_float(word):
  return struct.unpack('<f', struct.pack('<I', word & MASK))[0]


def _hands_on_unknown(f):
  def g(a, b):
    if isinstance(a, Unknown):
      return a
    return b if isinstance(b, Unknown) else f(a, b)

  return g


_FLOAT = {
  'add': lambda a, b: a + b,
  'sub': lambda a, b: a - b,
  'mul': lambda a, b: a * b,
  'max': max,
  'min': min,
}
_FLOAT_COMPARE = {
  'eq': lambda a, b: a == b,
  'ne': lambda a, b: a != b,
  'lt': lambda a, b: a < b,
  'le': lambda a, b: a <= b,
  'gt': lambda a, b: a > b,
  'ge': lambda a, b: a >= b,
}


def _of_floats(f):
  return lambda a, b: float_word(f(_word_float(a), _word_float(b)))


def _of_float_pair(f):
  return lambda a, b: f(_word_float(a), _word_float(b))


# What the Python of a translated block may call, two words each.
FUNCTIONS = {
  name: _hands_on_unknown(f)
  for name, f in {
    'shift_left': lambda a, b: (a << b) & MASK if b < 32 else 0,
    'shift_right': lambda a, b: a >> b if b < 32 else 0,
    'shift_right_signed': lambda a, b: (signed(a) >> min(b, 31)) & MASK,
    'shift_left_ones': lambda a, b: (
      ((a << b) | ((1 << b) - 1)) & MASK if b < 32 else MASK
    ),
    'unsigned_min': min,
    'unsigned_max': max,
    'signed_min': lambda a, b: min(a, b, key=signed),
    'signed_max': lambda a, b: max(a, b, key=signed),
    **{f'float_{n}': _of_floats(f) for n, f in _FLOAT.items()},
    **{f'float_{n}': _of_float_pair(f) for n, f in _FLOAT_COMPARE.items()},
  }.items()
}
