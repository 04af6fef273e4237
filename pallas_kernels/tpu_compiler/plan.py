"""Searches layouts of a program: memory against estimated time, compiled.

Every layout is compiled by the real compiler, which is dear, so that most are
not: those whose state alone is too large, those that need more than one that
did not fit, and those that the budget does not reach. Results are written as
they come; the same call goes on where one that was interrupted stopped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time
from typing import Any

from pallas_kernels.tpu_compiler import chips
from pallas_kernels.tpu_compiler import memory as memory_lib
from pallas_kernels.tpu_compiler.compile import CompileError
from pallas_kernels.tpu_compiler.compile import OutOfMemoryError
from pallas_kernels.tpu_compiler.compile import compile_built
from pallas_kernels.tpu_compiler.compile import versions
from pallas_kernels.tpu_compiler.memory import GIB

Layout = Mapping[str, Any]
FITS, TOO_LARGE, SKIPPED, FAILED = 'fits', 'too large', 'skipped', 'failed'


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much a search may take; `None` is no limit.

  Attributes:
    compilations: Programs compiled by this call; earlier results are free.
    seconds: After which no compilation begins.
    hbm_gib: Memory of a device, instead of the chip's.
  """

  compilations: int | None = None
  seconds: float | None = None
  hbm_gib: float | None = None


@dataclasses.dataclass(frozen=True)
class Point:
  """One layout on one topology.

  Attributes:
    topology: Its name.
    layout: What was chosen.
    status: 'fits', 'too large', 'skipped' (not compiled, surely too large) or
      'failed' (tried again by the next call).
    num_devices: Devices that the program runs on.
    memory: Bytes of a device by class.
    step_ms: Estimated time of a run, 0 where it is not known.
    exposed_collective_ms: Of it, waiting for collectives.
    work: What a run does, as the caller counts.
    flops: FLOPs per device.
    compile_s: Seconds that the compilation took.
    unknown: What could not be timed, see `Cost`.
    message: Why it is skipped or failed, or what to change.
    versions: Of jax and libtpu.
  """

  topology: str
  layout: dict[str, Any]
  status: str
  num_devices: int = 0
  memory: dict[str, int] = dataclasses.field(default_factory=dict)
  step_ms: float = 0.0
  exposed_collective_ms: float = 0.0
  work: float = 1.0
  flops: float = 0.0
  compile_s: float = 0.0
  unknown: tuple[str, ...] = ()
  message: str = ''
  versions: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> str:
    """Names the topology and the layout."""
    return _key(self.topology, self.layout)

  @property
  def gib(self) -> float:
    """Memory of a device."""
    return sum(self.memory.values()) / GIB

  @property
  def device_ms_per_work(self) -> float:
    """Time of one device for one unit of work."""
    return self.step_ms * self.num_devices / self.work


def layouts(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  """All combinations of some choices, the last name varying fastest."""
  return [
    dict(zip(choices, values, strict=True))
    for values in itertools.product(*choices.values())
  ]


def plan(
  fn_of_layout: Callable[[Layout], Callable[..., Any]],
  topologies: Sequence[str],
  budget: Budget = Budget(),
  *,
  layouts: Iterable[Layout],
  path: str | os.PathLike | None = None,
  rising: Mapping[str, Sequence[Any]] | None = None,
  at_least: Callable[[str, Layout], float] | None = None,
  work: Callable[[Layout], float] | None = None,
  classes: Mapping[str, str] = memory_lib.CLASSES,
  on_point: Callable[[Point], None] | None = None,
  at_most: int = 1,
  schedules: bool = True,
  cache_dir: str | os.PathLike | None = None,
  timeout_s: float = 1800.0,
) -> list[Point]:
  """Compiles a program in several layouts, and says what each would take.

  Args:
    fn_of_layout: Gives the `build` of `compile_built` for a layout; raises
      `ValueError` for one that makes no sense.
    topologies: Names of slices, see `compile_for`.
    budget: Where to stop.
    layouts: JSON-able mappings such as {'mesh': 'fsdp=16', 'remat': 'full'},
      in the order in which to try them; see `layouts`.
    path: JSON-lines file that results are added to and read from. It knows
      topology, layout and versions; another program needs another file.
    rising: Values of some names from least memory to most, such as {'remat':
      ['full', 'dots']}: where a layout does not fit, those that differ by later
      values are skipped.
    at_least: Bytes that a device needs in any case, of state for instance;
      layouts above the limit are skipped.
    work: What a run of a layout does, such as its tokens.
    classes: See `Compiled.memory_by_class`.
    on_point: Called with each result as it comes, also with earlier ones.
    at_most: Compilations at the same time.
    schedules: Keep and execute the schedules of Pallas kernels.
    cache_dir: See `compile_for`.
    timeout_s: For one compilation.

  Returns:
    Results in the order of `topologies` and `layouts`; those that the budget
    does not reach are left out.

  Raises:
    ValueError: `at_most` below 1, or an unknown topology.
  """
  if at_most < 1:
    raise ValueError(f'at_most={at_most} must be at least 1')
  search = _Search(budget, path, rising or {}, at_least, on_point)
  limits = {
    t: (budget.hbm_gib or chips.parse_topology(t).chip.hbm_gib) * GIB
    for t in topologies
  }
  candidates = [(t, dict(one)) for t in topologies for one in list(layouts)]

  def compile_one(topology, layout):
    point = Point(
      topology,
      layout,
      FAILED,
      num_devices=chips.parse_topology(topology).num_devices,
      work=work(layout) if work else 1.0,
      versions=versions(),
    )
    build = functools.partial(
      compile_built,
      topology=topology,
      schedules=schedules,
      cache_dir=cache_dir,
      timeout_s=timeout_s,
    )
    compile_it = lambda: build(fn_of_layout(layout))
    return _compiled(point, compile_it, limits[topology], classes)

  with concurrent.futures.ThreadPoolExecutor(at_most) as pool:
    running = set()
    for topology, layout in candidates:
      if len(running) >= at_most:
        running = search.collect(running)
      if search.is_known(topology, layout, limits[topology]):
        continue
      if search.may_begin():
        running.add(pool.submit(compile_one, topology, layout))
    while running:
      running = search.collect(running)
  found = (search.points.get(_key(t, layout)) for t, layout in candidates)
  return [point for point in found if point is not None]


def pareto(points: Iterable[Point]) -> list[Point]:
  """Those that fit and that no other one beats in memory and time per work."""
  known = [p for p in points if p.status == FITS]
  known.sort(key=lambda p: (p.device_ms_per_work, p.gib))
  front = []
  for point in known:
    if not front or point.gib < front[-1].gib:
      front.append(point)
  return front


def save(points: Sequence[Point], path: str | os.PathLike, **more: Any) -> None:
  """Writes all points, and which are on the Pareto front, as JSON.

  Args:
    points: Results of `plan`.
    path: File.
    **more: What else to write at its top, such as the model's name.
  """
  front = {p.key for p in pareto(points)}
  rows = [
    {**dataclasses.asdict(p), 'gib': round(p.gib, 3), 'pareto': p.key in front}
    for p in points
  ]
  text = json.dumps({**more, 'points': rows}, indent=1)
  pathlib.Path(path).write_text(text + '\n')


def table(points: Iterable[Point]) -> str:
  """A line for each point, the fastest that fit first."""
  points = list(points)
  front = {p.key for p in pareto(points)}
  order = sorted(
    points, key=lambda p: (p.status != FITS, p.device_ms_per_work, p.gib)
  )
  lines = ['step ms   exposed ms  GiB      layout (* no other beats both)']
  for p in order:
    time_ms = f'{p.step_ms:>9,.1f} {p.exposed_collective_ms:>9,.1f}'
    named = ' '.join(f'{k}={v}' for k, v in p.layout.items())
    lines.append(
      f'{time_ms if p.step_ms else " " * 19} {p.gib:>8.2f}  '
      f'{"*" if p.key in front else " "} {p.topology} {named}'
      + ('' if p.status == FITS else f': {p.status}')
    )
  return '\n'.join(lines)


class _Search:
  """Results so far, and what they allow."""

  def __init__(self, budget, path, rising, at_least, on_point):
    self._budget = budget
    self._path = None if path is None else pathlib.Path(path)
    self._rising = rising
    self._at_least = at_least
    self._on_point = on_point or (lambda point: None)
    self._begun = 0
    self._deadline = (
      None if budget.seconds is None else time.monotonic() + budget.seconds
    )
    self._earlier = {}
    if self._path is not None and self._path.exists():
      self._earlier = _read(self._path)
    self.points = {}

  def may_begin(self):
    """Whether the budget allows one more; counts it."""
    most, deadline = self._budget.compilations, self._deadline
    if most is not None and self._begun >= most:
      return False
    if deadline is not None and time.monotonic() > deadline:
      return False
    self._begun += 1
    return True

  def is_known(self, topology, layout, limit):
    """Whether a layout needs no compilation; then its point is there."""
    key = _key(topology, layout)
    if key in self._earlier:
      self._add(self._earlier[key])
      return True
    why = self._why_too_large(topology, layout, limit)
    if why:
      self._add(Point(topology, layout, SKIPPED, message=why))
    return bool(why)

  def collect(self, running):
    """Waits for one compilation or more, and writes their results."""
    done, running = concurrent.futures.wait(
      running, return_when=concurrent.futures.FIRST_COMPLETED
    )
    for future in done:
      point = future.result()
      if self._path is not None:
        with self._path.open('a', encoding='utf-8') as f:
          f.write(json.dumps(dataclasses.asdict(point)) + '\n')
      self._add(point)
    return running

  def _add(self, point):
    self.points[point.key] = point
    self._on_point(point)

  def _why_too_large(self, topology, layout, limit):
    if self._at_least is not None:
      least = self._at_least(topology, layout)
      if least > limit:
        return f'at least {least / GIB:.2f} GiB a device'
    for point in self.points.values():
      if point.status == TOO_LARGE and point.topology == topology:
        if self._needs_more(layout, point.layout):
          return f'needs more than {point.layout}, which does not fit'
    return ''

  def _needs_more(self, layout, other):
    if layout.keys() != other.keys():
      return False
    differing = [name for name in layout if layout[name] != other[name]]
    for name in differing:
      order = list(self._rising.get(name, ()))
      if layout[name] not in order or other[name] not in order:
        return False
      if order.index(layout[name]) < order.index(other[name]):
        return False
    return bool(differing)


def _compiled(point, compile_it, limit, classes):
  """The point with what the compiler says, its refusal included."""
  try:
    return _measured(point, compile_it(), limit, classes)
  except OutOfMemoryError as e:
    return dataclasses.replace(
      point,
      status=TOO_LARGE,
      num_devices=e.num_devices,
      memory=e.by_class(classes),
      message=e.advice(classes),
    )
  except (CompileError, TimeoutError, ValueError) as e:
    return dataclasses.replace(point, message=str(e)[:2000])


def _measured(point, compiled, limit, classes):
  cost = compiled.cost
  fits = compiled.memory.total <= limit
  return dataclasses.replace(
    point,
    status=FITS if fits else TOO_LARGE,
    num_devices=compiled.mesh_size,
    memory=compiled.memory_by_class(classes),
    step_ms=cost.step_ms,
    exposed_collective_ms=cost.exposed_collective_ms,
    flops=cost.flops,
    compile_s=compiled.compile_s,
    unknown=tuple(cost.unknown),
    message='' if fits else compiled.advice(limit / GIB, classes),
  )


def _key(topology, layout):
  return json.dumps([topology, dict(layout)], sort_keys=True)


def _read(path):
  """Results of earlier calls, by key; of other versions and failures none."""
  found = {}
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue  # The end of a file whose process was killed.
    point = Point(**{**row, 'unknown': tuple(row['unknown'])})
    if point.versions == versions() and point.status != FAILED:
      found[point.key] = point
  return found
