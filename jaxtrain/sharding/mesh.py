"""Device meshes from a one-line description.

Six axes, always in this order, from the slowest network to the fastest:
`stage` pipeline stages, `data` replicas, `fsdp` sharded replicas, `expert`
experts, `context` sequence shards, `tensor` heads and features. Axes that are
not named have size 1, so a rule may always mention them.
"""

from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np

AXES = ('stage', 'data', 'fsdp', 'expert', 'context', 'tensor')


def simulate_devices(count: int) -> None:
  """Makes this process see `count` CPU devices. Call before any JAX work.

  Raises:
    ValueError: `count` is below 1.
    RuntimeError: JAX has already chosen its devices.
  """
  if count < 1:
    raise ValueError(f'simulate_devices={count} must be at least 1')
  try:
    # First the update that refuses to come late, so that it changes nothing.
    jax.config.update('jax_num_cpu_devices', count)
    jax.config.update('jax_platforms', 'cpu')
  except RuntimeError as e:
    raise RuntimeError(
      f'simulate_devices({count}) came after JAX had started; call it first '
      '(in a notebook: restart the kernel)'
    ) from e


def parse(spec: str) -> dict[str, int]:
  """Reads 'data=2,fsdp=-1' as `{'data': 2, 'fsdp': -1}`.

  Raises:
    ValueError: An unknown or repeated axis, or a size that is not a positive
      integer or -1.
  """
  sizes = {}
  for item in filter(None, (s.strip() for s in spec.split(','))):
    name, _, size = item.partition('=')
    if name not in AXES:
      raise ValueError(
        f'mesh {spec!r}: unknown axis {name!r}; known: {", ".join(AXES)}'
      )
    if name in sizes:
      raise ValueError(f'mesh {spec!r}: axis {name!r} is given twice')
    try:
      sizes[name] = int(size)
    except ValueError:
      sizes[name] = 0
    if sizes[name] < 1 and sizes[name] != -1:
      raise ValueError(
        f'mesh {spec!r}: {name}={size!r} must be a positive integer or -1'
      )
  if list(sizes.values()).count(-1) > 1:
    raise ValueError(f'mesh {spec!r}: only one axis may be -1')
  return sizes


def make_mesh(
  spec: str = '',
  *,
  across_slices: str = '',
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Builds a mesh with all of `AXES` from a description such as 'fsdp=4'.

  Args:
    spec: Axis sizes, 'data=2,fsdp=2,tensor=2'. One axis may be -1: whatever is
      left. Without a -1, devices beyond the product stay unused; an empty
      description is one device.
    across_slices: The same for the slow network between TPU slices (or hosts
      of GPUs), for instance 'data=2'. `spec` then describes one slice, and the
      mesh has the products of both.
    devices: Which devices; all of them by default.

  Returns:
    A mesh whose axes are `AXES`, of type Auto.

  Raises:
    ValueError: An unknown axis, sizes that do not fit the devices, more slices
      than there are, or a process without a device in the mesh.
  """
  devices = list(jax.devices() if devices is None else devices)
  outer = parse(across_slices)
  if -1 in outer.values():
    raise ValueError(f'across_slices={across_slices!r} may not contain -1')
  num_slices = math.prod(outer.values())
  if len(devices) % num_slices:
    raise ValueError(
      f'across_slices={across_slices!r} needs {num_slices} equal slices, but '
      f'there are {len(devices)} devices'
    )
  per_slice = len(devices) // num_slices
  inner = _fill(spec, parse(spec), per_slice)
  shape = tuple(inner.get(a, 1) for a in AXES)
  if num_slices > 1:
    if math.prod(shape) != per_slice:
      raise ValueError(
        f'mesh {spec!r} uses {math.prod(shape)} devices of each slice, but '
        f'with across_slices={across_slices!r} a slice has {per_slice}'
      )
    grid = _hybrid(shape, tuple(outer.get(a, 1) for a in AXES), devices)
  else:
    used = devices[: math.prod(shape)]
    _check_processes(spec, used, devices)
    grid = mesh_utils.create_device_mesh(shape, used)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(spec, sizes, num_devices):
  """Resolves -1 and checks the product against the devices of one slice."""
  known = math.prod(s for s in sizes.values() if s != -1)
  if -1 in sizes.values():
    if num_devices % known:
      raise ValueError(
        f'mesh {spec!r}: {known} does not divide the {num_devices} devices, so '
        '-1 has no integer value'
      )
    return {a: num_devices // known if s == -1 else s for a, s in sizes.items()}
  if known > num_devices:
    raise ValueError(
      f'mesh {spec!r} needs {known} devices, but there are {num_devices} '
      '(--simulate_devices=N gives N on a CPU)'
    )
  return sizes


def _check_processes(spec, used, devices):
  """A process without a device in the mesh would wait for ever."""
  idle = {d.process_index for d in devices} - {d.process_index for d in used}
  if idle:
    raise ValueError(
      f'mesh {spec!r} uses {len(used)} of {len(devices)} devices and none of '
      f'processes {sorted(idle)}; every process must take part'
    )


def _hybrid(shape, outer_shape, devices):
  """Slices along `outer_shape`, chips of a slice along `shape`."""
  slices = {getattr(d, 'slice_index', 0) for d in devices}
  num_slices = math.prod(outer_shape)
  if len(slices) == num_slices:
    return mesh_utils.create_hybrid_device_mesh(shape, outer_shape, devices)
  if len(slices) > 1:
    raise ValueError(
      f'across_slices asks for {num_slices} slices, but the devices form '
      f'{len(slices)}'
    )
  # No slices to see (CPU, GPU, one slice): equal runs of devices are slices.
  blocks = np.array(devices, dtype=object).reshape(*outer_shape, *shape)
  n = len(shape)
  order = [axis for i in range(n) for axis in (i, n + i)]
  return blocks.transpose(order).reshape(
    [o * i for o, i in zip(outer_shape, shape, strict=True)]
  )
