"""Fetches the compiler: `python -m pallas_kernels.gpu_compiler`."""

from pallas_kernels.gpu_compiler import install

if not install.is_current():
  install.install()
