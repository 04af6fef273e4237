"""Fetches the GPU compiler.

JAX's CUDA plugin, ptxas and nvdisasm, 0.6 GB, into a folder of its own beside
the environment's packages: JAX itself must not find the plugin where there is
no GPU. Without it everything works but `gpu_compiler`.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax

FOLDER = pathlib.Path(sys.prefix) / 'gpu_compiler'
_PACKAGES = (
  f'jax-cuda12-plugin=={jax.__version__}',
  f'jax-cuda12-pjrt=={jax.__version__}',
  'nvidia-cuda-nvcc-cu12==12.9.86',
  'nvidia-cuda-nvdisasm==13.5.37',
)


def is_current() -> bool:
  """Whether the folder holds the versions that this JAX needs."""
  try:
    return (FOLDER / 'versions').read_text() == '\n'.join(_PACKAGES)
  except FileNotFoundError:
    return False


def install() -> None:
  """Fills the folder; a failure leaves what was there.

  Raises:
    subprocess.CalledProcessError: pip found no package or no network.
  """
  with tempfile.TemporaryDirectory(dir=sys.prefix) as new:
    folder = pathlib.Path(new) / FOLDER.name
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    options = ['--quiet', '--no-input', '--no-deps', '--target', str(folder)]
    subprocess.run([*pip, 'install', *options, *_PACKAGES], check=True)
    # The plugin takes its tools from one place, and from a newer one first.
    [nvdisasm] = folder.glob('nvidia/cu13/bin/nvdisasm')
    shutil.copy(nvdisasm, folder / 'nvidia' / 'cuda_nvcc' / 'bin')
    shutil.rmtree(folder / 'nvidia' / 'cu13')
    (folder / 'versions').write_text('\n'.join(_PACKAGES))
    shutil.rmtree(FOLDER, ignore_errors=True)
    folder.rename(FOLDER)
