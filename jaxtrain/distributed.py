"""Several processes as one JAX program."""

from collections.abc import Mapping
import glob
import importlib.util
import os

import jax
from jax.sharding import NamedSharding
import numpy as np


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout_s: int = 300,
) -> bool:
  """Joins the other processes, if there are any. Call before any JAX work.

  Without arguments the cluster is detected: TPU pods and slices (from the
  environment or the metadata server), SLURM and Open MPI jobs of several tasks.
  A single process, detected or said by `num_processes=1`, joins nothing.
  Several processes of CPUs compile without JAX's persistent cache from here on.

  Args:
    coordinator: 'host:port' of process 0.
    num_processes: How many processes there are.
    process_id: Number of this one, 0 for the one at `coordinator`.
    timeout_s: How long to wait for the others.

  Returns:
    Whether this process is one of several.

  Raises:
    ValueError: Only some of the arguments, or a number out of range.
    RuntimeError: The others did not come in time.
  """
  given = dict(
    coordinator=coordinator, num_processes=num_processes, process_id=process_id
  )
  if num_processes is not None and num_processes < 1:
    raise ValueError(f'num_processes={num_processes} must be at least 1')
  if num_processes == 1:
    return False
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(
      f'{", ".join(given)} go together; {", ".join(missing)} is missing'
    )
  if not missing and not 0 <= process_id < num_processes:
    raise ValueError(
      f'process_id={process_id} is not in 0..{num_processes - 1}'
    )
  if missing and not is_cluster():
    return False
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    coordinator, num_processes, process_id, initialization_timeout=timeout_s
  )
  if jax.process_count() > 1 and jax.devices()[0].platform == 'cpu':
    # Only process 0 fills JAX's cache of programs; one that is read and one
    # that is compiled may order their collectives differently, and gloo aborts.
    jax.config.update('jax_enable_compilation_cache', False)
  return jax.process_count() > 1


def is_cluster(environ: Mapping[str, str] | None = None) -> bool:
  """Whether the environment says that this is one of several processes.

  A TPU machine without `TPU_WORKER_HOSTNAMES` counts as one: its metadata
  server knows, and JAX asks it.
  """
  env = os.environ if environ is None else environ
  if 'SLURM_JOB_ID' in env and 'SLURM_PROCID' in env:
    return int(env.get('SLURM_NTASKS', 1)) > 1
  if 'OMPI_COMM_WORLD_SIZE' in env:
    return int(env['OMPI_COMM_WORLD_SIZE']) > 1
  if int(env.get('MEGASCALE_NUM_SLICES', 1)) > 1:
    return True
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  if hosts:
    return len(hosts.split(',')) > 1
  platforms = env.get('JAX_PLATFORMS', '')
  return (
    'TPU_SKIP_MDS_QUERY' not in env
    and (not platforms or 'tpu' in platforms)
    and importlib.util.find_spec('libtpu') is not None
    and bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))
  )


def batch_share(sharding: NamedSharding) -> tuple[int, int]:
  """Which rows of every batch this process must provide.

  Args:
    sharding: Of the batch; its first dimension is rows.

  Returns:
    `(i, n)`: the i-th of n equal runs of rows. Processes that hold the same
    rows have the same `i`.

  Raises:
    ValueError: The mesh gives processes rows that are not equal runs.
  """
  num_rows = sharding.mesh.size  # Whatever the shards are, this divides.
  shape = (num_rows,) * len(sharding.spec)
  rows: dict[int, set[int]] = {}
  for device, index in sharding.devices_indices_map(shape).items():
    start, stop, _ = index[0].indices(num_rows)
    rows.setdefault(device.process_index, set()).update(range(start, stop))
  if jax.process_index() not in rows:
    raise ValueError(
      f'process {jax.process_index()} has no device in the mesh '
      f'{_sizes(sharding.mesh)}'
    )
  shares = {tuple(sorted(r)) for r in rows.values()}
  count = len(shares)
  size = num_rows // count
  if shares != {tuple(range(i * size, (i + 1) * size)) for i in range(count)}:
    raise ValueError(
      f'the mesh {_sizes(sharding.mesh)} spreads the batch so that '
      'processes hold neither the same nor separate runs of rows'
    )
  return min(rows[jax.process_index()]) // size, count


def global_batch(
  batch: Mapping[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
  """Puts this process's rows on the mesh as their part of a global batch.

  Args:
    batch: Arrays `[B / n, T]`, n of `batch_share`.
    sharding: Of the global arrays `[B, T]`.

  Raises:
    ValueError: Dimensions that the mesh does not divide.
  """
  _, count = batch_share(sharding)
  result = {}
  for name, local in batch.items():
    shape = (local.shape[0] * count, *local.shape[1:])
    try:
      sharding.shard_shape(shape)
    except ValueError as e:
      raise ValueError(
        f'a batch of {shape[0]} rows of {shape[1]} tokens does not divide over '
        f'the mesh {_sizes(sharding.mesh)} as {sharding.spec}'
      ) from e
    result[name] = jax.make_array_from_process_local_data(
      sharding, local, shape
    )
  return result


def _sizes(mesh):
  return {axis: size for axis, size in mesh.shape.items() if size > 1}
