"""What the compiler says of a program, as plain data."""

import dataclasses
import json
import pathlib
import pickle
from typing import Any

import numpy as np

from pallas_kernels.tpu_compiler import chips
from pallas_kernels.tpu_compiler import collectives as collectives_lib
from pallas_kernels.tpu_compiler import dump
from pallas_kernels.tpu_compiler import hlo
from pallas_kernels.tpu_compiler import schedule as schedule_lib

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of HBM per device.

  Attributes:
    arguments: Inputs.
    outputs: Results, those that reuse an input's memory included.
    aliased: Of the results, the bytes that reuse a donated input's memory.
    temporaries: Buffers for everything in between, some of which share memory
      with each other or with results.
    generated_code: The program itself.
    peak: The most that is in use at once, without the program. Also counts what
      is kept in VMEM, up to 128 MiB.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  generated_code: int
  peak: int

  @property
  def total(self) -> int:
    """What a device must have."""
    return self.peak + self.generated_code

  def fits(self, hbm_gib: float) -> bool:
    """Whether a device with `hbm_gib` GiB holds it."""
    return self.total <= hbm_gib * _GIB

  def report(self) -> str:
    """A table, one class of memory a line."""
    rows = [*dataclasses.asdict(self).items(), ('total', self.total)]
    return '\n'.join(f'  {n:<16}{b / _GIB:>10.4f} GiB' for n, b in rows)


@dataclasses.dataclass(frozen=True)
class Cost:
  """The compiler's own estimate, per device; 0 is 'does not say'.

  Attributes:
    flops: Floating-point operations outside Pallas kernels.
    bytes_accessed: Bytes its operations read and write.
    optimal_seconds: Their time at best.
  """

  flops: float
  bytes_accessed: float
  optimal_seconds: float

  def report(self) -> str:
    """One line."""
    best = ''
    if self.optimal_seconds:
      best = f', at best {self.optimal_seconds * 1e3:.4g} ms'
    return (
      f'cost per device: {self.flops:.4g} FLOPs, {self.bytes_accessed:.4g} '
      f'bytes{best}'
    )


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
    memory: HBM per device.
    cost: The compiler's estimate.
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
  memory: Memory
  cost: Cost
  collectives: tuple[collectives_lib.Collective, ...]
  kernels: tuple[str, ...]
  versions: dict[str, str]
  lower_s: float
  compile_s: float

  @classmethod
  def load(cls, folder: pathlib.Path, topology: str) -> 'Compiled':
    """Reads a folder that `compile_for` has written."""
    result = json.loads((folder / 'result.json').read_text())
    memory, cost = result['memory'], result['cost']
    program = hlo.parse((folder / 'hlo.txt').read_text())
    return cls(
      folder=folder,
      topology=topology,
      chip=chips.parse_topology(topology).chip.name,
      device_kind=result['device_kind'],
      num_devices=result['num_devices'],
      mesh_axes=result['mesh_axes'],
      arguments=result['arguments'],
      memory=Memory(
        arguments=memory['argument_size_in_bytes'],
        outputs=memory['output_size_in_bytes'],
        aliased=memory['alias_size_in_bytes'],
        temporaries=memory['temp_size_in_bytes'],
        generated_code=memory['generated_code_size_in_bytes'],
        peak=memory['peak_memory_in_bytes'],
      ),
      cost=Cost(
        flops=cost.get('flops', 0.0),
        bytes_accessed=cost.get('bytes accessed', 0.0),
        optimal_seconds=max(cost.get('optimal_seconds', 0.0), 0.0),
      ),
      collectives=tuple(collectives_lib.find(program, result['mesh_axes'])),
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

  def check(
    self,
    hbm_gib: float | None = None,
    exposed_collective_bytes: float | None = None,
  ) -> None:
    """For CI: raises if the program needs more than it may.

    Args:
      hbm_gib: Memory of a device; by default the chip's.
      exposed_collective_bytes: Bytes per device and run in collectives that
        nothing hides; by default any number.

    Raises:
      ValueError: What exceeds which limit, and of what it consists.
    """
    limit = chips.CHIPS[self.chip].hbm_gib if hbm_gib is None else hbm_gib
    failures = []
    if not self.memory.fits(limit):
      failures.append(
        f'{self.memory.total / _GIB:.2f} GiB of HBM per device exceed '
        f'{limit:g} GiB:\n{self.memory.report()}'
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
    name = _choose(kernel_name, self.kernels, tuple(files))
    program = hlo.parse(self.hlo_text.read_text())
    recorded = pickle.loads((self.folder / 'operands.pkl').read_bytes())
    return schedule_lib.run(
      files[name],
      chips.CHIPS[self.chip],
      layouts=hlo.operand_layouts(program, name),
      recorded=recorded,
      operands=operands or {},
    )

  def report(self) -> str:
    """The memory, cost and collectives, for people."""
    lines = [
      f'{self.topology}: {self.num_devices} x {self.device_kind}, mesh '
      f'{self.mesh_axes}, compiled in {self.compile_s:.1f} s by libtpu '
      f'{self.versions["libtpu"]}',
      'memory per device',
      self.memory.report(),
      self.cost.report(),
      f'collectives: {len(self.collectives)}',
      *(f'  {line}' for line in collectives_lib.summary(self.collectives)),
      f'Pallas kernels: {", ".join(self.kernels) or "none"}',
    ]
    return '\n'.join(lines)


def _choose(wanted: str | None, pallas: tuple[str, ...], known: Any) -> str:
  """The one kernel that `wanted` means."""
  names = [n for n in pallas if n in known] if wanted is None else known
  if wanted in known:
    return wanted
  found = [n for n in names if wanted is None or wanted in n]
  if len(found) != 1:
    raise ValueError(
      f'kernel_name={wanted!r} means {", ".join(found) or "none"}; known: '
      f'{", ".join(known)}'
    )
  return found[0]
