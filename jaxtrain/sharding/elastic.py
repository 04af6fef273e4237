"""Which mesh is left when devices are lost, so that training can go on.

The axes that only split the batch give way, as in elastic data parallelism
(TorchElastic; Varuna, Athlur et al., https://arxiv.org/abs/2111.04007, section
4.2, from memory, which also keeps the global batch by accumulating more):
`data` takes any size, `fsdp` any divisor of what it was, because it also
divides parameters. The others describe how the model is cut, and stay.
"""

from collections.abc import Iterator
import math

from jaxtrain.sharding import mesh as mesh_lib

# What cuts the rows of a batch; `expert` cuts parameters too, so it stays.
_ROWS = ('data', 'fsdp', 'expert')


def shrink_mesh(
  spec: str, num_devices: int, *, batch_size: int, devices_per_process: int = 1
) -> str:
  """The largest mesh like `spec` on at most `num_devices` devices.

  Of equally large ones that with the largest `fsdp`, whose devices hold less.

  Args:
    spec: The whole mesh, such as 'data=4,fsdp=2,tensor=2', without -1.
    num_devices: How many there are now.
    batch_size: Rows of the global batch, which must divide over the mesh.
    devices_per_process: Processes are used as a whole, or one of them in part.

  Returns:
    A description for `make_mesh`, its axes those of `spec`; `spec` itself, up
    to spaces, where there are enough devices.

  Raises:
    ValueError: A -1, a batch that not even `spec` divides, or too few devices
      for the axes that stay.
  """
  sizes = mesh_lib.parse(spec)
  if -1 in sizes.values():
    raise ValueError(f'mesh {spec!r}: -1 has no size to shrink from')
  if not _fits(sizes, math.inf, batch_size, devices_per_process):
    raise ValueError(
      f'mesh {spec!r} cannot cut batch_size={batch_size} into equal rows, or '
      f'leaves part of a process of {devices_per_process} devices idle'
    )
  candidates = [
    c
    for c in _smaller(sizes)
    if _fits(c, num_devices, batch_size, devices_per_process)
  ]
  if not candidates:
    fixed = {a: s for a, s in sizes.items() if a not in ('data', 'fsdp')}
    raise ValueError(
      f'{num_devices} devices are too few for mesh {spec!r}, of which '
      f'{_describe(fixed) or "one device"} must stay, in processes of '
      f'{devices_per_process} devices'
    )
  best = max(
    candidates, key=lambda c: (math.prod(c.values()), c.get('fsdp', 1))
  )
  return _describe(best)


def num_processes(spec: str, devices_per_process: int) -> int:
  """How many processes of so many devices a mesh takes."""
  return math.ceil(size(spec) / devices_per_process)


def size(spec: str) -> int:
  """Number of devices of a mesh without -1."""
  return math.prod(mesh_lib.parse(spec).values())


def accumulation(
  whole: str, spec: str, *, batch_size: int, accumulation: int = 1
) -> int:
  """Parts of the batch for which a device's share is no larger than before.

  The sum over parts is the same as without them, up to the order of addition.

  Args:
    whole: The mesh that `accumulation` was meant for.
    spec: The mesh there is now, which divides the batch.
    batch_size: Rows of the global batch.
    accumulation: Parts on `whole`.

  Returns:
    The smallest number of parts that divide the rows of a device and are no
    larger than those on `whole`.
  """
  before = batch_size // (_num_row_shards(whole) * accumulation)
  rows = batch_size // _num_row_shards(spec)
  return next(
    parts
    for parts in range(1, rows + 1)
    if rows % parts == 0 and rows // parts <= max(before, 1)
  )


def _smaller(sizes) -> Iterator[dict[str, int]]:
  """All meshes with smaller `data`, and divisors of `fsdp`."""
  for data in range(1, sizes.get('data', 1) + 1):
    for fsdp in range(1, sizes.get('fsdp', 1) + 1):
      if sizes.get('fsdp', 1) % fsdp == 0:
        new = dict(data=data, fsdp=fsdp)
        yield {axis: new.get(axis, s) for axis, s in sizes.items()}


def _fits(sizes, num_devices, batch_size, devices_per_process):
  used = math.prod(sizes.values())
  whole = used % devices_per_process == 0 or used < devices_per_process
  rows = math.prod(sizes.get(axis, 1) for axis in _ROWS)
  return used <= num_devices and whole and batch_size % rows == 0


def _num_row_shards(spec):
  sizes = mesh_lib.parse(spec)
  return math.prod(sizes.get(axis, 1) for axis in _ROWS)


def _describe(sizes):
  return ','.join(f'{axis}={s}' for axis, s in sizes.items())
