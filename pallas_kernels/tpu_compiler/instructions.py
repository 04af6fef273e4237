"""What each instruction does, as a line of Python.

Scalar and predicate instructions compute; copies, waits and semaphores call the
machine; the vector units only take their cycle. Whatever else there is raises.

The Python refers to registers by their names, to the clock `T` (cycle at the
start of the block) and to the machine's functions.
"""

from collections.abc import Callable
import re

from pallas_kernels.tpu_compiler.listing import Instruction
from pallas_kernels.tpu_compiler.values import MASK
from pallas_kernels.tpu_compiler.values import SIGN
from pallas_kernels.tpu_compiler.values import UnknownInstructionError
from pallas_kernels.tpu_compiler.values import float_word

# They touch neither scalars nor time beyond their own cycle.
_WITHOUT_EFFECT = frozenset(
  {
    'compiler-scheduling-barrier',
    'sdelay',
    'sfence',
    'snop',
    'vdelay',
    'vnop',
    'vset',
    'vsetiar',
    'vsetrngseed',
    'vsettm',
    'vstmask',
    'vtrace',
  }
)
_EXPRESSIONS = {
  'int_to_ptr': '{0}',
  'pand': '{0} & {1}',
  'pmov': '{0}',
  'pnand': '({0} & {1}) ^ 1',
  'pneg': '{0} ^ 1',
  'pnor': '({0} | {1}) ^ 1',
  'por': '{0} | {1}',
  'ptr_to_int': '{0}',
  'pxor': '{0} ^ {1}',
  'reloc': '{0}',
  'sadd': f'({{0}} + {{1}}) & {MASK}',
  'sand': '{0} & {1}',
  'sc': f'({{0}} + {{1}}) > {MASK}',
  'smov': '{0}',
  'smul': f'({{0}} * {{1}}) & {MASK}',
  'sor': '{0} | {1}',
  'sshll': 'shift_left({0}, {1})',
  'sshllo': 'shift_left_ones({0}, {1})',
  'sshra': 'shift_right_signed({0}, {1})',
  'sshrl': 'shift_right({0}, {1})',
  'ssub': f'({{0}} - {{1}}) & {MASK}',
  'sxor': '{0} ^ {1}',
}
# Of integers as they stand in _EXPRESSIONS.
_INTEGER_ARITHMETIC = ('sadd', 'smul', 'ssub')
# By whole opcode; these come first.
_TYPED_EXPRESSIONS = {
  'smax.s32': 'signed_max({0}, {1})',
  'smax.u32': 'unsigned_max({0}, {1})',
  'smin.s32': 'signed_min({0}, {1})',
  'smin.u32': 'unsigned_min({0}, {1})',
  'smulhi.u32': '({0} * {1}) >> 32',
  **{
    f's{op}.f32': f'float_{op}({{0}}, {{1}})'
    for op in ('add', 'sub', 'mul', 'max', 'min')
  },
}
_RELATIONS = {
  'eq': '==',
  'ge': '>=',
  'gt': '>',
  'le': '<=',
  'lt': '<',
  'ne': '!=',
}
_DIVISIONS = ('kDiv', 'kDivAndRem', 'kRem')
_DMA_OPTIONS = (
  'dst_stride',
  'dst_syncflagno',
  'size_in_granules',
  'src_stride',
  'src_syncflagno',
  'steps_per_stride',
  'stridedescaddr',
)
_SCALAR_NAME = re.compile(r'^(s|p)\d+_')
_INTEGER = re.compile(r'^-?\d+$')
_FLOAT = re.compile(r'^-?[\d.]+(e[+-]?\d+)?$')


def is_vector_constant(i: Instruction) -> bool:
  """Whether an instruction gives a vector whose value scalars may read."""
  constant = i.opcode == 'vmov' and i.args and _INTEGER.match(i.args[0])
  return bool(i.results) and (bool(constant) or i.opcode == 'vpop.ccrf')


class Translator:
  """Translates instructions one by one.

  Attributes:
    assigned: Python names that the translations assign to.
  """

  def __init__(
    self, allocation: Callable[[str], int], known_vectors: frozenset[str]
  ):
    """Takes where an allocation is and which vectors have known values."""
    self._allocation = allocation
    self._known_vectors = known_vectors
    self.assigned: set[str] = set()

  def assign(self, name: str, expression: str) -> str:
    """A line that gives a Python name a value."""
    self.assigned.add(name)
    return f'{name} = {expression}'

  def lines(self, i: Instruction, offset: int) -> list[str]:
    """The Python of an instruction, `offset` cycles into its block.

    Raises:
      UnknownInstructionError: With its text.
    """
    unconditional = self._unconditional(i, offset)
    if i.predicate is None or not unconditional:
      return unconditional
    condition = f'not {i.predicate}' if i.negated else i.predicate
    if i.fallback is None:
      return [f'if {condition}:', *(f'  {line}' for line in unconditional)]
    if i.name != 'smov':
      raise _unknown(i, 'a select')
    return [
      self.assign(
        i.results[0],
        _select(
          i.predicate,
          condition,
          self.operand(i.args[0], i),
          self.operand(i.fallback, i),
        ),
      )
    ]

  def operand(self, text: str, i: Instruction) -> str:
    """An operand as a Python expression."""
    # '16 [#allocation3]': the bracket only says what the address points into.
    text = re.sub(r'^(\S+) \[#.*\]$', r'\1', text.strip())
    if text.startswith('[') and text.endswith(']'):
      parts = [self.operand(p, i) for p in text[1:-1].split(' + ')]
      return f'({" + ".join(parts)})'
    if text.startswith('#'):
      return str(self._allocation(text[1:]))
    if text.startswith('$'):
      return str(int(text[1:], 16))
    if text.startswith(('%s', '%p')):
      return text[1:]
    if text.startswith('%v'):
      known = text[1:] in self._known_vectors
      return text[1:] if known else f'Unknown({text!r})'
    if _INTEGER.match(text):
      return str(int(text) & MASK)
    if _FLOAT.match(text) or text in ('inf', '-inf', 'nan'):
      return str(float_word(float(text)))
    if text in ('true', 'false'):
      return str(int(text == 'true'))
    raise _unknown(i, f'the operand {text!r} of')

  def _unconditional(self, i, offset):
    if i.name in _WITHOUT_EFFECT:
      return []
    expression = _TYPED_EXPRESSIONS.get(i.opcode)
    is_float = '.f' in i.opcode and i.name in _INTEGER_ARITHMETIC
    if expression is None and not is_float:
      expression = _EXPRESSIONS.get(i.name)
    if expression is not None:
      args = [self.operand(a, i) for a in i.args]
      return [self.assign(i.results[0], expression.format(*args))]
    special = getattr(self, f'_op_{i.name}', None)
    if special is not None:
      return special(i, offset)
    return self._vector(i)

  def _vector(self, i):
    is_scalar = any(_SCALAR_NAME.match(r) for r in i.results)
    if i.name.startswith('v') and is_scalar and i.results[0][0] == 's':
      return [self.assign(i.results[0], f'Unknown({i.text[:120]!r})')]
    if i.name.startswith('v') and not is_scalar:
      return []
    raise _unknown(i)

  def _op_inlined_call_operand(self, i, offset):
    del offset
    return [self.assign(i.results[0], f'OPERANDS[{i.results[0]!r}]')]

  def _op_scmp(self, i, offset):
    del offset
    _, relation, dtype = i.opcode.split('.')[:3]
    a, b = (self.operand(a, i) for a in i.args)
    if dtype == 'f32':
      expression = f'float_{relation}({a}, {b})'
    elif dtype == 'u32' or relation in ('eq', 'ne'):
      expression = f'{a} {_RELATIONS[relation]} {b}'
    elif dtype == 's32':
      # With the sign bit flipped, signed order is unsigned order.
      a, b = (
        str(int(x) ^ SIGN) if x.isdigit() else f'({x} ^ {SIGN})' for x in (a, b)
      )
      expression = f'{a} {_RELATIONS[relation]} {b}'
    else:
      raise _unknown(i)
    return [self.assign(i.results[0], expression)]

  def _op_scalar_select(self, i, offset):
    del offset
    names = ('predicate', 'on_true', 'on_false')
    p, on_true, on_false = (self.operand(i.keywords[n], i) for n in names)
    return [self.assign(i.results[0], _select(p, p, on_true, on_false))]

  def _op_scalar_lea(self, i, offset):
    del offset
    total = ' + '.join(self.operand(a, i) for a in i.args)
    return [self.assign(i.results[0], f'({total}) & {MASK}')]

  def _op_sld(self, i, offset):
    del offset
    return [self.assign(i.results[0], f'load({self._smem_address(i)})')]

  def _op_sst(self, i, offset):
    del offset
    value = i.args[1] if len(i.args) > 1 else i.keywords['sx']
    return [f'store({self._smem_address(i)}, {self.operand(value, i)})']

  def _smem_address(self, i):
    match = re.fullmatch(r'\[smem:\[(.*)\]\]', i.args[0])
    if match is None:
      raise _unknown(i, 'the place of')
    return self.operand(f'[{match[1]}]', i)

  def _op_dma(self, i, offset):
    if i.opcode.startswith('dma.done.wait'):
      semaphore, amount = (self.operand(a, i) for a in i.args[:2])
      return [_wait('ge', semaphore, amount, i, offset)]
    kind = i.opcode.removeprefix('dma.')
    if 'src_syncflagno' in i.keywords and kind != 'general':
      raise _unknown(i, 'a copy between devices:')
    ends = [k for k in i.keywords if k not in _DMA_OPTIONS]
    if len(ends) < 2:
      raise _unknown(i, 'the ends of')
    names = (ends[0], ends[1], 'size_in_granules', 'dst_syncflagno')
    values = ', '.join(self.operand(i.keywords[n], i) for n in names)
    return [f'copy({kind!r}, T + {offset}, {values}, {i.address})']

  def _op_vsyncadd(self, i, offset):
    semaphore, amount = (self.operand(a, i) for a in i.args[:2])
    if '.remote' in i.opcode:
      call = f'{semaphore}, {amount}, T + {offset}, {i.address}'
      return [f'signal_other_core({call})']
    return [f'signal({semaphore}, {amount}, T + {offset})']

  def _op_vsyncset(self, i, offset):
    if '.remote' in i.opcode:
      raise _unknown(i, 'a semaphore of another device:')
    return self._op_vsyncpa(i, offset)

  def _op_vsyncpa(self, i, offset):
    # Presence and parity of a flag; its count starts again.
    return [f'reset({self.operand(i.args[0], i)}, T + {offset})']

  def _op_vsyncmov(self, i, offset):
    value = f'semaphore_value({self.operand(i.args[0], i)}, T + {offset})'
    return [self.assign(f'queue_{i.results[0]}', f'[{value}]')]

  def _op_vwait(self, i, offset):
    relation = i.opcode.split('.')[1]
    if relation not in _RELATIONS:
      raise _unknown(i)
    semaphore, amount = (self.operand(a, i) for a in i.args[:2])
    return [_wait(relation, semaphore, amount, i, offset)]

  def _op_sdivrem(self, i, offset):
    del offset
    # Quotient, then remainder; a comment says which of them are wanted.
    kind = i.keywords.get('kind')
    if i.opcode != 'sdivrem.u32' or kind not in _DIVISIONS:
      raise _unknown(i)
    a, b = (self.operand(a, i) for a in i.args)
    return [self.assign(f'queue_{i.results[0]}', f'divide({a}, {b}, {kind!r})')]

  def _op_spop(self, i, offset):
    del offset
    queue = f'queue_{i.args[0].removeprefix("%")}'
    return [self.assign(i.results[0], f'{queue}.pop(0)')]

  def _op_vpush(self, i, offset):
    del offset
    value = self.operand(i.args[0], i)
    if i.opcode == 'vpush.ccrf':
      return [f'CORE_QUEUE.append({value})']
    return [self.assign(f'queue_{i.results[0]}', f'[{value}]')]

  def _op_vpop(self, i, offset):
    if i.opcode == 'vpop.sfrf':  # As libtpu 0.0.42 spells spop.sfrf.
      return self._op_spop(i, offset)
    if i.opcode == 'vpop.ccrf':
      return [self.assign(i.results[0], 'CORE_QUEUE.pop(0)')]
    return self._vector(i)

  def _op_vmov(self, i, offset):
    del offset
    if is_vector_constant(i):
      return [self.assign(i.results[0], str(int(i.args[0]) & MASK))]
    return self._vector(i)

  def _op_shalt(self, i, offset):
    del offset
    return [f'halt({i.address})']


def _wait(relation, semaphore, amount, i, offset):
  call = f'wait({relation!r}, {semaphore}, {amount}, T + {offset}, {i.address})'
  return f'T = {call} - {offset}'


def _select(predicate, condition, on_true, on_false):
  """A choice by an unknown predicate is unknown, and no error yet."""
  return (
    f'{predicate} if {predicate}.__class__ is Unknown else '
    f'({on_true} if {condition} else {on_false})'
  )


def _unknown(i, what='the instruction'):
  return UnknownInstructionError(
    f'{what} at {i.address:#x} is not modelled: {i.text}'
  )
