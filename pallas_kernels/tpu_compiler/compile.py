"""The real TPU compiler, in a child process, on a machine without a TPU.

libtpu compiles for any topology (`jax.experimental.topologies`); only running
needs the chip.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from pallas_kernels.tpu_compiler import call as call_lib
from pallas_kernels.tpu_compiler import chips
from pallas_kernels.tpu_compiler import dump
from pallas_kernels.tpu_compiler import memory as memory_lib
from pallas_kernels.tpu_compiler import pickling
from pallas_kernels.tpu_compiler.result import Compiled

DEFAULT_CACHE = pathlib.Path('~/.cache/onemesh/tpu_compiler')
# Of what a folder of the cache holds; a change makes old folders unread.
_FORMAT = 2
_LOG_CHARACTERS = 4000
# A folder of a job this old belongs to a process that was killed.
_ABANDONED_S = 24 * 3600
# What changes the program that a function is traced to.
_JAX_CONFIG = (
  'jax_default_matmul_precision',
  'jax_default_prng_impl',
  'jax_enable_x64',
  'jax_numpy_dtype_promotion',
  'jax_threefry_partitionable',
)


class CompileError(RuntimeError):
  """The compiler, or the tracing before it, refused; carries its words."""


class OutOfMemoryError(CompileError):
  """The program does not fit; says what it would take, and what to change.

  Attributes:
    memory: Bytes of a device, as far as they are known; all temporaries are in
      `peak`.
    arguments: Bytes per device of each argument, by its path.
    whole_arguments: The same over all devices, each element once.
    num_devices: Of the mesh.
    limit_bytes: What the compiler may use of a device's memory.
  """

  def __init__(self, message: str, result: Mapping[str, Any], needed: int):
    super().__init__(message)
    self.arguments = result['arguments']
    self.whole_arguments = result['whole_arguments']
    self.num_devices = math.prod(result['mesh_axes'].values()) or 1
    size = sum(self.arguments.values())
    self.memory = memory_lib.Memory(size, 0, 0, needed - size, 0, needed)
    self.limit_bytes = float(
      _gib(message, r'(?:exceeds available HBM \(| of )')
    )

  def by_class(
    self, classes: Mapping[str, str] = memory_lib.CLASSES
  ) -> dict[str, int]:
    """See `Compiled.memory_by_class`; collectives are in the temporaries."""
    return memory_lib.by_class(self.memory, self.arguments, classes)

  def advice(self, classes: Mapping[str, str] = memory_lib.CLASSES) -> str:
    """See `Compiled.advice`."""
    return memory_lib.advice(
      self.by_class(classes),
      memory_lib.argument_classes(self.whole_arguments, classes),
      self.num_devices,
      self.limit_bytes,
    )


def compile_for(
  fn: Callable[..., Any],
  *args: Any,
  topology: str,
  mesh_axes: Mapping[str, int] | None = None,
  in_shardings: Any = None,
  out_shardings: Any = None,
  donate_argnums: int | Sequence[int] = (),
  schedules: bool = True,
  flags: Sequence[str] = (),
  cache_dir: str | os.PathLike | None = None,
  timeout_s: float = 600.0,
  **static: Any,
) -> Compiled:
  """Compiles `fn(*args, **static)` for TPUs that need not be there.

  Args:
    fn: Function, jitted or not. Sent to another process by cloudpickle, so it
      must not hold devices: see `compile_built` where it has to.
    *args: Pytrees of `jax.ShapeDtypeStruct`, and of arrays where the values
      steer a kernel (page tables, lengths) and a schedule is wanted.
    topology: 'v5e' is one device, 'v5e:4x8' or 'v5p:4x4x4' a whole slice; v4,
      v5e, v5p, v6e and tpu7x.
    mesh_axes: Names and sizes of the mesh; by default that of the shardings of
      `args`, or {'device': all of them}.
    in_shardings: As for `jax.jit`, if `fn` is not jitted: `PartitionSpec`s, or
      `NamedSharding`s over any mesh with these axes. By default the arguments'
      own, else replicated.
    out_shardings: The same.
    donate_argnums: As for `jax.jit`.
    schedules: Keep what `Compiled.schedule` reads; several MB for a model.
    flags: More flags for libtpu, such as '--xla_tpu_scoped_vmem_limit_kib=1'.
    cache_dir: Where results are kept, by the lowered program and by versions;
      ~/.cache/onemesh/tpu_compiler by default.
    timeout_s: For the whole of it.
    **static: Keyword arguments of `fn` that are not arrays.

  Returns:
    What the compiler says; plain data.

  Raises:
    ValueError: An unknown chip or shape, a mesh that does not fit, or options
      for a function that is jitted already.
    ModuleNotFoundError: libtpu is not installed.
    TimeoutError: `timeout_s` has passed.
    OutOfMemoryError: The program does not fit into a device.
    CompileError: Any other error of the compiler.
    ChildProcessError: Its process was killed.
  """
  target = chips.parse_topology(topology)
  given = dict(
    in_shardings=in_shardings,
    out_shardings=out_shardings,
    donate_argnums=donate_argnums,
  )
  given = {k: v for k, v in given.items() if v is not None and v != ()}
  call = call_lib.make_call(
    fn, args, static, target.num_devices, mesh_axes, given
  )
  return compile_built(
    call,
    topology=topology,
    schedules=schedules,
    flags=flags,
    cache_dir=cache_dir,
    timeout_s=timeout_s,
  )


def compile_built(
  build: Callable[[Sequence[Any]], tuple[Any, tuple[Any, ...]]],
  *,
  topology: str,
  schedules: bool = True,
  flags: Sequence[str] = (),
  cache_dir: str | os.PathLike | None = None,
  timeout_s: float = 600.0,
) -> Compiled:
  """Compiles a program whose making needs the devices.

  Args:
    build: Called in the child with the topology's devices; returns a jitted
      function and abstract arguments with shardings over them. Its method
      `values(args)`, if it has one, gives the values of the flattened arguments
      that steer kernels, `None` for others.
    topology: See `compile_for`, as the others are.
    schedules: Keep what `Compiled.schedule` reads.
    flags: For libtpu.
    cache_dir: Where results are kept.
    timeout_s: For the whole of it.

  Returns:
    See `compile_for`, and for what is raised.
  """
  target = chips.parse_topology(topology)
  cache = pathlib.Path(cache_dir or DEFAULT_CACHE).expanduser().resolve()
  cache.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(cache)
  folder = pathlib.Path(tempfile.mkdtemp(prefix='job-', dir=cache))
  try:
    config = target.chip.config
    dump_flags = dump.flags(folder / 'dump') if schedules else []
    head = dict(
      jax_config={name: getattr(jax.config, name) for name in _JAX_CONFIG},
      sys_path=[p or os.getcwd() for p in sys.path],
      topology=target.topology,
      topology_options={'chip_config_name': config} if config else {},
      num_devices=target.num_devices,
      cache_dir=str(cache),
      flags=[bool(schedules), *flags],
      format=_FORMAT,
      **versions(),
    )
    env = _environment(target, [*dump_flags, *flags])
    result = _run_worker(folder, head, build, env, timeout_s)
    kept = cache / result['key']
    if not kept.exists():
      _keep(folder, kept)
    return Compiled.load(kept, topology)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(cache):
  for job in cache.glob('job-*'):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - job.stat().st_mtime > _ABANDONED_S:
        shutil.rmtree(job, ignore_errors=True)


def versions() -> dict[str, str]:
  """Of 'jax' and 'libtpu'.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ModuleNotFoundError(
      'the TPU compiler is not installed; it needs no TPU: '
      "pip install 'onemesh[tpu]'",
      name='libtpu',
    )
  return dict(jax=jax.__version__, libtpu=importlib.metadata.version('libtpu'))


def _environment(target, flags):
  return dict(
    JAX_PLATFORMS='cpu',
    TPU_SKIP_MDS_QUERY='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE=target.chip.accelerator_type,
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    LIBTPU_INIT_ARGS=' '.join(flags),
  )


def _run_worker(folder, head, build, env, timeout_s):
  """Runs the child; returns its result or raises its error."""
  (folder / 'dump').mkdir()
  job = folder / 'job.pkl'
  job.write_bytes(pickle.dumps(head) + pickling.dumps(build))
  # Of the parent's flags the child wants none: eight CPU devices, say.
  inherited = {
    k: v
    for k, v in os.environ.items()
    if k not in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_COMPILATION_CACHE_DIR')
  }
  root = pathlib.Path(__file__).parent.parent.parent
  paths = [str(root), inherited.get('PYTHONPATH')]
  inherited['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
  name = 'pallas_kernels.tpu_compiler.worker'
  with open(folder / 'log.txt', 'w') as log:
    try:
      done = subprocess.run(
        [sys.executable, '-m', name, str(job), str(folder)],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        timeout=timeout_s,
        env={**inherited, **env},
      )
    except subprocess.TimeoutExpired:
      raise TimeoutError(
        f'compiling for {head["topology"]} passed timeout_s={timeout_s:g}'
      ) from None
  path = folder / 'result.json'
  if -done.returncode in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
    # Nothing is known of the program then.
    raise ChildProcessError(
      f'the compiler of {head["topology"]} was ended by '
      f'{signal.Signals(-done.returncode).name}; a lack of memory may be why'
    )
  if not path.exists():
    text = (folder / 'log.txt').read_text(errors='replace')
    raise CompileError(
      f'the compiler of {head["topology"]} died (exit code '
      f'{done.returncode}):\n{text[-_LOG_CHARACTERS:]}'
    )
  result = json.loads(path.read_text())
  if 'error' in result:
    message = f'for {head["topology"]}: {result["error"]}'
    needed = _gib(message, r'(?:temporaries \(|Used )')
    if needed and 'arguments' in result:
      raise OutOfMemoryError(message, result, needed)
    raise CompileError(message)
  return result


def _gib(message, before):
  """Bytes of a size that an out-of-memory message has after some words."""
  match = re.search(before + r'([\d.]+)([KMGT])', message)
  scale = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  return int(float(match[1]) * scale[match[2]]) if match else 0


def _keep(folder, kept):
  """Moves a finished job into the cache."""
  for name in ('job.pkl', 'log.txt'):
    (folder / name).unlink()
  dump.prune(folder / 'dump')
  try:
    folder.rename(kept)
  except OSError:
    # Another process was faster with the same program.
    if not (kept / 'result.json').exists():
      raise
