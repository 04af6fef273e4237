"""Compiles a function for a GPU that is not there."""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gpu_compiler import install
from pallas_kernels.gpu_compiler import kernels
from pallas_kernels.gpu_compiler.chips import CHIPS

_CUSTOM_CALLS = ('mosaic_gpu_v2', 'mosaic_gpu')


class NotInstalledError(RuntimeError):
  """The compiler is not there."""


class CompileError(RuntimeError):
  """The compiler refused, or died."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program for a GPU.

  Attributes:
    kernels: Its Mosaic GPU kernels, each as often as it was compiled.
    hlo: The optimised program.
    seconds: That compiling took, after tracing.
  """

  kernels: tuple[kernels.Kernel, ...]
  hlo: str = dataclasses.field(repr=False)
  seconds: float


def is_installed() -> bool:
  """Whether `compile_for` can work."""
  return install.is_current()


def compile_for(
  fn: Callable[..., Any], *args: Any, chip: str = 'h200', **kwargs: Any
) -> Compiled:
  """Compiles `fn(*args, **kwargs)` for one GPU.

  Ops choose their kernels as for the GPU of `hopper.current()`.

  Args:
    fn: Of arrays; may be jitted.
    *args: Pytrees of arrays or `jax.ShapeDtypeStruct`.
    chip: One of `CHIPS`.
    **kwargs: Static arguments.

  Raises:
    ValueError: An unknown chip.
    NotInstalledError: `install` has not run, or for another JAX.
    CompileError: What XLA or ptxas say.
  """
  if chip not in CHIPS:
    raise ValueError(f'chip={chip!r} must be one of {sorted(CHIPS)}')
  if not is_installed():
    raise NotInstalledError(
      'the GPU compiler is not installed for this JAX: '
      'python -m pallas_kernels.gpu_compiler'
    )
  checks = [export.DisabledSafetyCheck.custom_call(n) for n in _CUSTOM_CALLS]
  fn = functools.partial(fn, **kwargs)
  with pltpu.force_tpu_interpret_mode(None):
    exported = export.export(
      jax.jit(fn), platforms=['cuda'], disabled_checks=checks
    )(*args)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    (path / 'program').write_bytes(exported.serialize())
    (path / 'target').write_text(CHIPS[chip].target_config)
    _run_worker(path)
    result = json.loads((path / 'result.json').read_text())
    if 'error' in result:
      raise CompileError(result['error'])
    return Compiled(kernels=kernels.read(path), **result)


def _run_worker(folder):
  """Compiles in a process with the CUDA plugin, which this one must not load.

  A new one each time: it would keep, and not show, a kernel that it has
  compiled before.
  """
  root = pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': os.pathsep.join((str(root), str(install.FOLDER))),
    'JAX_PLATFORMS': 'cpu',
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
    'XLA_FLAGS': '',
    'MOSAIC_GPU_DUMP_TO': str(folder),
    'MOSAIC_GPU_DUMP_PTXAS': '1',
    'MOSAIC_GPU_DUMP_SASS': '1',
  }
  done = subprocess.run(
    [sys.executable, '-m', 'pallas_kernels.gpu_compiler.worker', str(folder)],
    env=env,
    capture_output=True,
    text=True,
  )
  if not (folder / 'result.json').exists():
    raise CompileError(f'the compiler died: {done.stderr[-4000:]}')
