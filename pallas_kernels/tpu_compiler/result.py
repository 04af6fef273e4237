"""What the compiler says of a program, as plain data."""

from collections.abc import Mapping
import dataclasses
import functools
import json
import math
import pathlib
import pickle
import re
from typing import Any

import numpy as np

from pallas_kernels.tpu_compiler import chips
from pallas_kernels.tpu_compiler import collectives as collectives_lib
from pallas_kernels.tpu_compiler import dump
from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler import memory as memory_lib
from pallas_kernels.tpu_compiler import products
from pallas_kernels.tpu_compiler import schedule as schedule_lib
from pallas_kernels.tpu_compiler import timeline
from pallas_kernels.tpu_compiler.memory import GIB
from pallas_kernels.tpu_compiler.memory import Memory
from pallas_kernels.tpu_compiler.network import Network

_BODY = re.compile(r'"custom_call_config":\{"body":"([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one run of the program costs a device, loops counted.

  Times are estimates, see `timeline`.

  Attributes:
    flops: FLOPs of matrix products, and those that Pallas kernels say of
      themselves; recomputation and masked halves included.
    bytes_accessed: Bytes that instructions read from and write to HBM.
    cycles: Of the chip's clock, from start to end.
    step_ms: The same as time.
    compute_ms: XLA's instructions.
    kernel_ms: Pallas kernels, by instruction.
    copy_ms: Waiting for copies between memories.
    exposed_ms: Waiting for collectives, by name.
    unknown: What could not be timed, and why, see `timeline.Timeline`.
  """

  flops: float
  bytes_accessed: float
  cycles: float
  step_ms: float
  compute_ms: float
  kernel_ms: dict[str, float]
  copy_ms: float
  exposed_ms: dict[str, float]
  unknown: dict[str, str]

  @property
  def exposed_collective_ms(self) -> float:
    """Waiting for collectives."""
    return sum(self.exposed_ms.values(), 0.0)

  def report(self) -> str:
    """Two lines, and one for each thing that could not be timed."""
    lines = [
      f'cost per device: {self.flops:.4g} FLOPs, {self.bytes_accessed:.4g} '
      'bytes of HBM traffic',
      f'estimated {self.step_ms:,.2f} ms: XLA {self.compute_ms:,.2f}, Pallas '
      f'{sum(self.kernel_ms.values()):,.2f}, exposed collectives '
      f'{self.exposed_collective_ms:,.2f}, exposed copies {self.copy_ms:,.2f}',
    ]
    for name, why in self.unknown.items():
      lines.append(f'  {name} could not be timed: {why}')
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program, without the program: picklable, and no TPU held.

  Attributes:
    folder: Folder of the cache with the compiler's texts.
    topology: What was asked for.
    chip: Name in `chips.CHIPS`.
    device_kind: JAX's name of the device.
    num_devices: Devices of the topology that are used.
    mesh_axes: Names and sizes of the mesh.
    arguments: Bytes per device of each argument, by its path: '[0].step'.
    whole_arguments: The same over all devices, each element once.
    memory: HBM per device.
    collectives: Communication between devices, in program order.
    kernels: Names of the Pallas kernels, in program order.
    versions: Of 'jax' and 'libtpu'.
    lower_s: Seconds it took to trace and lower.
    compile_s: Seconds it took to compile.
  """

  folder: pathlib.Path
  topology: str
  chip: str
  device_kind: str
  num_devices: int
  mesh_axes: dict[str, int]
  arguments: dict[str, int]
  whole_arguments: dict[str, int]
  memory: Memory
  collectives: tuple[collectives_lib.Collective, ...]
  kernels: tuple[str, ...]
  versions: dict[str, str]
  lower_s: float
  compile_s: float

  @classmethod
  def load(cls, folder: pathlib.Path, topology: str) -> 'Compiled':
    """Reads a folder that `compile_for` has written."""
    result = json.loads((folder / 'result.json').read_text())
    program = hlo.parse((folder / 'hlo.txt').read_text())
    chip = chips.parse_topology(topology).chip
    network = Network.of(chip, result['coords'])
    collectives = tuple(
      collectives_lib.find(program, result['mesh_axes'], network)
    )
    memory = result['memory']
    return cls(
      folder=folder,
      topology=topology,
      chip=chip.name,
      device_kind=result['device_kind'],
      num_devices=result['num_devices'],
      mesh_axes=result['mesh_axes'],
      arguments=result['arguments'],
      whole_arguments=result['whole_arguments'],
      memory=Memory(
        arguments=memory['argument_size_in_bytes'],
        outputs=memory['output_size_in_bytes'],
        aliased=memory['alias_size_in_bytes'],
        temporaries=memory['temp_size_in_bytes'],
        generated_code=memory['generated_code_size_in_bytes'],
        peak=memory['peak_memory_in_bytes'],
        collectives=collectives_lib.live_bytes(program, collectives),
        host=sum(
          size
          for name, size in memory.items()
          if name in ('host_argument_size_in_bytes', 'host_temp_size_in_bytes')
        ),
      ),
      collectives=collectives,
      kernels=tuple(hlo.pallas_kernels(program)),
      versions={name: result[name] for name in ('jax', 'libtpu')},
      lower_s=result['lower_s'],
      compile_s=result['compile_s'],
    )

  @property
  def hlo_text(self) -> pathlib.Path:
    """File with the optimised program."""
    return self.folder / 'hlo.txt'

  @property
  def scheduled(self) -> tuple[str, ...]:
    """Names that `schedule` knows: Pallas kernels and XLA's fusions."""
    return tuple(dump.kernel_files(self.folder / 'dump'))

  @functools.cached_property
  def cost(self) -> Cost:
    """What a run costs; Pallas kernels are executed where their data allow."""
    program = hlo.parse(self.hlo_text.read_text())
    chip = chips.CHIPS[self.chip]
    moved = {}

    def kernel_cycles(name):
      found = self.schedule(name)
      moved[name] = found.bytes
      return found.cycles

    line = timeline.run(program, chip, self.collectives, kernel_cycles)
    ms = lambda cycles: cycles / chip.clock_ghz / 1e6
    return Cost(
      flops=products.flops(program),
      bytes_accessed=products.bytes_accessed(program, moved),
      cycles=line.cycles,
      step_ms=ms(line.cycles),
      compute_ms=ms(line.compute),
      kernel_ms={name: ms(c) for name, c in line.kernels.items()},
      copy_ms=ms(line.copies),
      exposed_ms={name: ms(c) for name, c in line.exposed.items() if c},
      unknown=line.unknown,
    )

  def mfu(self, model_flops: float) -> float:
    """Model FLOPs utilisation at the estimated step time.

    Args:
      model_flops: What the model needs for a run of the whole mesh, attention
        by the full square (PaLM, https://arxiv.org/abs/2204.02311, appendix B)
        or by its causal half.
    """
    peak = chips.CHIPS[self.chip].peak_tflops * 1e12 * self.mesh_size
    return model_flops / (self.cost.step_ms * 1e-3) / peak

  @property
  def mesh_size(self) -> int:
    """Devices that the program runs on."""
    return math.prod(self.mesh_axes.values()) or self.num_devices

  def memory_by_class(
    self, classes: Mapping[str, str] = memory_lib.CLASSES
  ) -> dict[str, int]:
    """Bytes of a device by what they hold; they add up to `memory.total`.

    Args:
      classes: Start of an argument's path -> name of a class, by default the
        parameters and the optimizer state of a training step.
    """
    return memory_lib.by_class(self.memory, self.arguments, classes)

  def advice(
    self,
    hbm_gib: float | None = None,
    classes: Mapping[str, str] = memory_lib.CLASSES,
  ) -> str:
    """What to change where the program does not fit.

    Args:
      hbm_gib: Memory of a device; by default the chip's.
      classes: See `memory_by_class`.
    """
    limit = chips.CHIPS[self.chip].hbm_gib if hbm_gib is None else hbm_gib
    return memory_lib.advice(
      self.memory_by_class(classes),
      memory_lib.argument_classes(self.whole_arguments, classes),
      self.mesh_size,
      limit * GIB,
    )

  def check(
    self,
    hbm_gib: float | None = None,
    exposed_collective_ms: float | None = None,
    exposed_collective_bytes: float | None = None,
    classes: Mapping[str, str] = memory_lib.CLASSES,
  ) -> None:
    """For CI: raises if the program needs more than it may.

    Args:
      hbm_gib: Memory of a device; by default the chip's.
      exposed_collective_ms: Time per run that nothing but communication goes
        on, as estimated; by default any.
      exposed_collective_bytes: Bytes per device and run in collectives that
        nothing hides; by default any number.
      classes: See `memory_by_class`.

    Raises:
      ValueError: What exceeds which limit, of what it consists, and what to
        change.
    """
    limit = chips.CHIPS[self.chip].hbm_gib if hbm_gib is None else hbm_gib
    failures = []
    if not self.memory.fits(limit):
      failures.append(
        f'{self.memory.total / GIB:.2f} GiB of HBM per device exceed '
        f'{limit:g} GiB:\n{memory_lib.table(self.memory_by_class(classes))}\n'
        f'{self.advice(limit, classes)}'
      )
    exposed = [c for c in self.collectives if not c.asynchronous]
    total = sum(c.bytes * c.count for c in exposed)
    if exposed_collective_bytes is not None:
      if total > exposed_collective_bytes:
        failures.append(
          f'{total:,} bytes in exposed collectives exceed '
          f'{exposed_collective_bytes:,.0f}:\n'
          + '\n'.join(map(collectives_lib.Collective.report, exposed))
        )
    if exposed_collective_ms is not None:
      waited = self.cost.exposed_ms
      if self.cost.exposed_collective_ms > exposed_collective_ms:
        worst = sorted(
          (c for c in self.collectives if waited.get(c.name)),
          key=lambda c: -waited[c.name],
        )
        failures.append(
          f'{self.cost.exposed_collective_ms:.3f} ms of exposed collectives '
          f'exceed {exposed_collective_ms:g} ms:\n'
          + '\n'.join(f'{waited[c.name]:.3f} ms: {c.report()}' for c in worst)
        )
    if failures:
      raise ValueError('\n'.join([f'for {self.topology}:', *failures]))

  def schedule(
    self,
    kernel_name: str | None = None,
    *,
    operands: dict[int, np.ndarray] | None = None,
  ) -> schedule_lib.Schedule:
    """Executes the compiled schedule of one kernel; see `schedule.run`.

    Args:
      kernel_name: Its name, or a part that only its name has; may be left out
        where there is one Pallas kernel.
      operands: Values of operands that tracing could not know, by index.

    Raises:
      ValueError: No such kernel, or several.
    """
    files = dump.kernel_files(self.folder / 'dump')
    if not files:
      raise ValueError('compiled with schedules=False: there are none')
    program = hlo.parse(self.hlo_text.read_text())
    twin = _twin(program, kernel_name, files)
    name = _choose(twin, self.kernels, tuple(files))
    recorded = pickle.loads((self.folder / 'operands.pkl').read_bytes())
    return schedule_lib.run(
      files[name],
      chips.CHIPS[self.chip],
      layouts=hlo.operand_layouts(program, name),
      recorded=recorded,
      operands=operands or {},
    )

  def report(self, classes: Mapping[str, str] = memory_lib.CLASSES) -> str:
    """The memory, cost and collectives, for people.

    Args:
      classes: See `memory_by_class`.
    """
    cost, hbm = self.cost, chips.CHIPS[self.chip].hbm_gib
    lines = [
      f'{self.topology}: {self.num_devices} x {self.device_kind}, mesh '
      f'{self.mesh_axes}, compiled in {self.compile_s:.1f} s by libtpu '
      f'{self.versions["libtpu"]}',
      'memory per device',
      memory_lib.table(self.memory_by_class(classes)),
      f'  {self.memory.total / GIB:.2f} of {hbm:g} GiB: '
      f'{self.advice(hbm, classes)}',
      cost.report(),
      f'collectives: {len(self.collectives)}',
      *(
        f'  {line}'
        for line in collectives_lib.summary(self.collectives, cost.exposed_ms)
      ),
      f'Pallas kernels: {", ".join(self.kernels) or "none"}',
    ]
    return '\n'.join(lines)


def _twin(program: hlo.Program, name: str | None, known: Any) -> str | None:
  """A listed kernel that is the same as `name`: such compile once."""
  body = lambda n: _BODY.findall(program.instructions.get(n, ''))
  if name in known or not body(name):
    return name
  return next((other for other in known if body(other) == body(name)), name)


def _choose(wanted: str | None, pallas: tuple[str, ...], known: Any) -> str:
  """The one kernel that `wanted` means."""
  names = [n for n in pallas if n in known] if wanted is None else known
  if wanted in known:
    return wanted
  found = [n for n in names if wanted is None or wanted in n]
  if len(found) != 1:
    shown = [*pallas, *(n for n in known if n not in pallas)]
    raise ValueError(
      f'kernel_name={wanted!r} means {", ".join(found) or "none"}; known: '
      + ', '.join(shown[:20])
      + (f' and {len(shown) - 20} more' if len(shown) > 20 else '')
    )
  return found[0]
