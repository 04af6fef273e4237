"""FLOPs and HBM bytes of a compiled program, the rounds of its loops counted.

XLA's own count takes a loop's body once. Here every matrix product counts as
often as it runs: two FLOPs for each pair of elements that meet; padding, with
which the TPU compiler writes sharded products as convolutions, does not count.
"""

from collections.abc import Mapping
import json
import math
import re

from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler.hlo import Program

_WINDOW = re.compile(r'window=\{([^}]*)\}')
_LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')
_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')
_GROUPS = re.compile(r'(feature|batch)_group_count=(\d+)')
_ALIASES = re.compile(r'\{(\d+)\}: \((\d+), ')
_ESTIMATE = re.compile(r'"cost_estimate":(\{[^}]*\})')
# They name memory and move none.
_FREE = frozenset(
  'after-all bitcast constant get-tuple-element iota parameter partition-id '
  'replica-id tuple while conditional call opt-barrier domain'.split()
)


def flops(program: Program) -> float:
  """FLOPs of all matrix products, and what Pallas kernels say of themselves."""
  total = 0.0
  for computation, names in program.computations.items():
    once = 0.0
    for name in names:
      text = program.instructions[name]
      opcode = hlo.opcode_of(text)
      if opcode == 'dot':
        once += _dot(program, text)
      elif opcode == 'convolution':
        once += _convolution(program, text)
      elif opcode == 'custom-call':
        once += estimate(text).get('flops', 0.0)
    total += once * program.run_counts[computation]
  return total


def estimate(text: str) -> dict[str, float]:
  """A Pallas kernel's cost estimate: 'flops', 'bytes_accessed', if it has one.

  Args:
    text: Of its instruction.
  """
  match = _ESTIMATE.search(text)
  if match is None:
    return {}
  return {name: float(n) for name, n in json.loads(match[1]).items()}


def bytes_accessed(
  program: Program, kernel_bytes: Mapping[str, int] | None = None
) -> float:
  """Bytes that the scheduled instructions read from and write to HBM.

  Args:
    program: The module.
    kernel_bytes: Of Pallas kernels, by instruction; those that are not there
      count what their cost estimate says, or nothing.
  """
  known = kernel_bytes or {}
  total = 0.0
  for computation in scheduled(program):
    times = program.run_counts[computation]
    for name in program.computations[computation]:
      moved = known.get(name)
      if moved is None:
        moved = instruction_bytes(program, name)
      total += times * moved
  return total


def scheduled(program: Program) -> list[str]:
  """Computations whose instructions run one after the other: no fused ones."""
  found = [program.entry]
  for computation in found:
    for name in program.computations[computation]:
      text = program.instructions[name]
      if hlo.opcode_of(text) in ('while', 'conditional', 'call'):
        found += [c for c, _ in hlo.calls(text) if c not in found]
  return found


def instruction_bytes(program: Program, name: str) -> int:
  """HBM bytes of one run of a scheduled instruction."""
  text = program.instructions[name]
  opcode = hlo.opcode_of(text)
  if opcode in _FREE or opcode.endswith('-done'):
    return 0
  if 'custom_call_target="tpu_custom_call"' in text:
    # Which of its operands a kernel reads only the kernel knows.
    return int(estimate(text).get('bytes_accessed', 0))
  callee = next((c for c, how in hlo.calls(text) if how == 'calls'), None)
  if opcode.endswith('-start'):
    # Its type repeats the operand's; both ends may be in HBM.
    return hlo.array_bytes(hlo.result_of(text), hbm_only=True)
  passed = set()
  if 'async_collective' in (callee or ''):
    # Buffers of the collective that goes on; these are its operands.
    passed = {int(i) for _, i in _ALIASES.findall(text)}
  operands = hlo.operands_of(text)
  read = sum(
    _read(program, callee, i, operand)
    for i, operand in enumerate(operands)
    if i not in passed
  )
  handed_on = sum(
    hlo.array_bytes(
      hlo.result_of(program.instructions.get(operands[i], '')), hbm_only=True
    )
    for i in passed
  )
  return read + max(_written(program, callee, text) - handed_on, 0)


def _read(program, callee, index, operand):
  """Of an operand, what the instruction reads."""
  text = program.instructions.get(operand, '')
  whole = hlo.array_bytes(hlo.result_of(text), hbm_only=True)
  if not whole or callee not in program.computations:
    return whole
  names = program.computations[callee]
  mine = [
    n
    for n in names
    if re.search(rf' parameter\({index}\)', program.instructions[n])
  ]
  readers = [
    program.instructions[n]
    for n in names
    if mine and mine[0] in hlo.operands_of(program.instructions[n])
  ]
  parts = 0
  for reader in readers:
    opcode = hlo.opcode_of(reader)
    if opcode in ('dynamic-slice', 'slice', 'gather'):
      parts += hlo.array_bytes(hlo.result_of(reader))
    elif (
      opcode == 'dynamic-update-slice' and hlo.operands_of(reader)[0] == mine[0]
    ):
      continue  # Updated in place.
    else:
      return whole
  return min(parts, whole)


def _written(program, callee, text):
  """Of the results, what is written: of an update in place, the update."""
  whole = hlo.array_bytes(hlo.result_of(text), hbm_only=True)
  if not whole:
    return 0
  names = program.computations.get(callee) or ()
  bodies = [program.instructions[n] for n in names] or [text]
  for body in bodies:
    if hlo.opcode_of(body) == 'dynamic-update-slice':
      update = program.instructions.get(hlo.operands_of(body)[1], '')
      whole -= hlo.array_bytes(hlo.result_of(body))
      whole += hlo.array_bytes(hlo.result_of(update))
  return max(whole, 0)


def _dot(program, text):
  left = hlo.shape_of(program.instructions[hlo.operands_of(text)[0]])
  contracted = hlo.sizes_of(_CONTRACTED.search(text)[1])
  out = math.prod(hlo.shape_of(text))
  return 2.0 * out * math.prod(left[i] for i in contracted)


def _convolution(program, text):
  """As many products as there are pairs of input and kernel elements."""
  left, right = (
    hlo.shape_of(program.instructions[n]) for n in hlo.operands_of(text)
  )
  labels = _LABELS.search(text)
  out = hlo.shape_of(text)
  groups = dict(_GROUPS.findall(text))
  pairs = out[labels[3].index('f')] * left[labels[1].index('f')]
  pairs //= int(groups.get('feature', 1))
  pairs *= left[labels[1].index('b')] // int(groups.get('batch', 1))
  match = _WINDOW.search(text)
  window = dict(x.split('=') for x in match[1].split()) if match else {}
  for d in range(len(labels[1]) - 2):
    at = [side.index(str(d)) for side in labels.groups()]
    pairs *= _valid(left[at[0]], right[at[1]], out[at[2]], window, d)
  return 2.0 * pairs


def _valid(left, right, out, window, dim):
  """Pairs along one dimension of the window that are not padding."""

  def number(name, default):
    return int(window[name].split('x')[dim]) if name in window else default

  stride, low = number('stride', 1), 0
  spread, dilation = number('lhs_dilate', 1), number('rhs_dilate', 1)
  if 'pad' in window:
    low = int(window['pad'].split('x')[dim].split('_')[0])
  count = 0
  for k in range(right):
    # Positions o with 0 <= o * stride + k * dilation - low < extent, on the
    # elements and not between them.
    first = k * dilation - low
    extent = (left - 1) * spread + 1
    if spread == 1:
      begin = max(0, -(first // stride))
      end = min(out, (extent - 1 - first) // stride + 1)
      count += max(end - begin, 0)
    else:
      positions = (o * stride + first for o in range(out))
      count += sum(0 <= p < extent and p % spread == 0 for p in positions)
  return count
