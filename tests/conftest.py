"""Eight CPU devices, TPU kernels interpreted, programs compiled once.

Tests run on the CPU wherever they are. To run those marked for a device:
`JAX_PLATFORMS=tpu pytest -m tpu`, `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

from importlib import metadata
import os
import pathlib

_DEVICES = '--xla_force_host_platform_device_count'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Threads of a program: those of an interpreted GPU kernel wait for each other.
# JAX before 0.11 interprets none.
if tuple(map(int, metadata.version('jax').split('.')[:2])) >= (0, 11):
  os.environ.setdefault('NPROC', '16')
# Most of the time is compilation: with little of LLVM's optimisation a sixth
# less of it.
for flag, value in {_DEVICES: 8, '--xla_backend_optimization_level': 1}.items():
  xla_flags = os.environ.get('XLA_FLAGS', '')
  if flag not in xla_flags:
    os.environ['XLA_FLAGS'] = f'{xla_flags} {flag}={value}'

from absl import flags
import hypothesis
import jax
from jax.experimental.pallas import tpu as pltpu
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_MARK_OF = {'tpu': 'tpu', 'gpu': 'gpu', 'cuda': 'gpu'}

# A size limit makes JAX lock the cache, so that two workers can share it.
jax.config.update('jax_compilation_cache_dir', str(_ROOT / '.cache' / 'jax'))
jax.config.update('jax_compilation_cache_max_size', 2**30)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)

# The same examples every run, and no deadline: the first one compiles.
hypothesis.settings.register_profile(
  'onemesh', deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile('onemesh')

# Binaries are called as functions: their flags have their defaults.
flags.FLAGS.mark_as_parsed()


def pytest_configure(config):
  """Off TPU, runs Pallas TPU kernels on CPU, scratch memory full of NaN."""
  del config
  if jax.default_backend() != 'tpu':
    pltpu.set_tpu_interpret_mode()


def pytest_collection_modifyitems(items):
  """Skips tests marked for a device that is not there."""
  here = _MARK_OF.get(jax.default_backend())
  for item in items:
    for mark in {'tpu', 'gpu'} - {here}:
      if item.get_closest_marker(mark):
        item.add_marker(pytest.mark.skip(reason=f'needs a {mark.upper()}'))
