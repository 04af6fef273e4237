"""Estimated time of a whole program: its schedule, on one clock.

The compiler lists instructions in the order in which the chip runs them and
says how many cycles it expects each to take. Walking that list, loops as often
as they run, gives the time of a step:

* an instruction takes its estimate, a Pallas kernel what executing its own
  schedule gives, anything else its bytes over the bandwidth;
* a collective takes what the links need (`network`), after those before it
  along the same axes; what has not passed between its start and its end is
  waited for: that is exposed;
* copies between memories are waited for in the same way.

Both cores of a chip that works as one are in the compiler's estimates already.
Against executing XLA's own fusions, estimates of matrix products are up to 8 %
long on v5e and 10 to 30 % on v6e and tpu7x. Small and memory-bound fusions are
estimated two to five times too long: a training step, where products prevail,
is rather an upper bound; a step of many small fusions, such as a decode, is not
timed by this sum but for its Pallas kernels.
"""

from collections.abc import Callable, Iterable
import dataclasses
import re

from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler import products
from pallas_kernels.tpu_compiler.chips import Chip
from pallas_kernels.tpu_compiler.collectives import Collective
from pallas_kernels.tpu_compiler.hlo import Program

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
# The compiler's word for a fusion that it has no estimate of.
_NO_ESTIMATE = 1 << 60
_COPIES = ('copy-start', 'slice-start', 'dynamic-slice-start', 'async-start')
_HOST = 'S(5)'


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Cycles of one run of a program, or of a part of it.

  Attributes:
    cycles: From start to end.
    compute: Of XLA's instructions.
    kernels: Of Pallas kernels, by name.
    copies: Waited for copies between memories.
    exposed: Waited for collectives, by name.
    unknown: What could not be timed, and why: Pallas kernels whose schedule
      could not be executed, which count what their cost estimate needs, or
      nothing; loops whose length nobody says, which count once.
  """

  cycles: float = 0.0
  compute: float = 0.0
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  copies: float = 0.0
  exposed: dict[str, float] = dataclasses.field(default_factory=dict)
  unknown: dict[str, str] = dataclasses.field(default_factory=dict)

  def plus(self, other: 'Timeline', times: int = 1) -> 'Timeline':
    """This one, followed by another one some times."""
    return Timeline(
      self.cycles + times * other.cycles,
      self.compute + times * other.compute,
      _added(self.kernels, other.kernels, times),
      self.copies + times * other.copies,
      _added(self.exposed, other.exposed, times),
      {**self.unknown, **other.unknown},
    )


def run(
  program: Program,
  chip: Chip,
  collectives: Iterable[Collective],
  kernel_cycles: Callable[[str], float],
) -> Timeline:
  """Runs through the schedule of a program.

  Args:
    program: Its module.
    chip: What it is compiled for.
    collectives: Those of the program, with their milliseconds.
    kernel_cycles: Cycles of a Pallas kernel, by the name of its instruction;
      raises `RuntimeError` or `ValueError` if they cannot be known.
  """
  return _Walk(program, chip, collectives, kernel_cycles).computation(
    program.entry
  )


class _Walk:
  """Times computations; each once, whoever runs it."""

  def __init__(self, program, chip, collectives, kernel_cycles):
    self._program = program
    self._chip = chip
    self._kernel_cycles = kernel_cycles
    self._begins, self._ends = {}, {}
    for c in collectives:
      if c.parts:
        self._begins[c.parts[0]] = c
        self._ends[c.parts[-1]] = c
    self._known = {}
    self._kernels = {}

  def computation(self, name):
    if name not in self._known:
      self._known[name] = self._run(self._program.computations[name])
    return self._known[name]

  def _run(self, names):
    """One after the other; `free` says when links and memories are."""
    total, free, done = Timeline(), {}, {}
    for name in names:
      text = self._program.instructions[name]
      opcode = hlo.opcode_of(text)
      collective = self._begins.get(name)
      if collective is not None:
        begin = max(total.cycles, free.get(collective.axes, 0.0))
        done[collective.name] = free[collective.axes] = begin + (
          collective.milliseconds * self._chip.clock_ghz * 1e6
        )
      elif opcode in _COPIES:
        line, cycles = self._copy(text)
        done[name] = max(total.cycles, free.get(line, 0.0)) + cycles
        free[line] = done[name] - self._chip.dma.read_latency
      total = total.plus(self._instruction(name, text, opcode))
      if name in self._ends:
        ended = self._ends[name].name
        # A part that is not in this computation has begun before it.
        wait = max(done.pop(ended, 0.0) - total.cycles, 0.0)
        total = total.plus(Timeline(cycles=wait, exposed={ended: wait}))
      elif opcode.endswith('-done'):
        begun = hlo.operands_of(text)[:1]
        wait = max(max(map(done.get, begun, [0.0])) - total.cycles, 0.0)
        total = total.plus(Timeline(cycles=wait, copies=wait))
    return total

  def _instruction(self, name, text, opcode):
    """Time of what is not communication."""
    callees = [
      (callee, how)
      for callee, how in hlo.calls(text)
      if callee in self._program.computations
    ]
    if opcode == 'while':
      body = next(callee for callee, how in callees if how == 'body')
      trips = hlo.trips(self._program, text)
      if trips is None:
        why = {name: 'a loop of unknown length, counted once'}
        return Timeline(unknown=why).plus(self.computation(body))
      return Timeline().plus(self.computation(body), trips)
    if opcode == 'conditional':
      branches = [self.computation(callee) for callee, _ in callees]
      return max(branches, key=lambda b: b.cycles, default=Timeline())
    if opcode == 'call':
      return self.computation(callees[0][0])
    if 'custom_call_target="tpu_custom_call"' in text:
      return self._kernel(name, text)
    if opcode.endswith(('-start', '-done')):
      return Timeline()
    match = _ESTIMATE.search(text)
    cycles = float(match[1]) if match else 0.0
    if not match or cycles > _NO_ESTIMATE:
      if name in self._begins or name in self._ends:
        return Timeline()
      size = products.instruction_bytes(self._program, name)
      cycles = size / self._chip.dma.bytes_per_cycle
    return Timeline(cycles=cycles, compute=cycles)

  def _kernel(self, name, text):
    if name not in self._kernels:
      unknown = {}
      try:
        cycles = self._kernel_cycles(name)
      except (RuntimeError, ValueError) as e:
        unknown[name] = str(e).partition('\n')[0]
        cycles = self._estimated(text)
      self._kernels[name] = Timeline(
        cycles, kernels={name: cycles}, unknown=unknown
      )
    return self._kernels[name]

  def _estimated(self, text):
    """What a kernel's own cost estimate needs at least."""
    cost = products.estimate(text)
    seconds = max(
      cost.get('flops', 0.0) / (self._chip.peak_tflops * 1e12),
      cost.get('bytes_accessed', 0.0) / (self._chip.hbm_gb_per_s * 1e9),
    )
    return seconds * self._chip.clock_ghz * 1e9

  def _copy(self, text):
    """Which memory a copy waits for, and its cycles."""
    result = hlo.result_of(text)
    size = hlo.array_bytes(result) / 2  # The type repeats the operand's.
    if _HOST in result:
      return 'host', size / self._chip.host_gb_per_s * self._chip.clock_ghz
    dma = self._chip.dma
    return 'hbm', size / dma.bytes_per_cycle + dma.read_latency


def _added(a, b, times):
  if not b:
    return a
  return {**a, **{name: a.get(name, 0.0) + times * n for name, n in b.items()}}
