"""Which chip a kernel is being traced for, for its block sizes."""

import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu

_NAMES = {
  'TPU_V4': 'v4',
  'TPU_V5E': 'v5e',
  'TPU_V5P': 'v5p',
  'TPU_V6E': 'v6e',
  'TPU_7X': 'tpu7x',
}
_V5E_VMEM_BYTES = 128 * 2**20
# Left to the compiler.
_MARGIN = 1 / 8


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A TPU generation.

  Attributes:
    name: As in `tpu_compiler.CHIPS`.
    vmem_bytes: What a kernel's blocks and scratch may take of VMEM.
  """

  name: str
  vmem_bytes: int


def current() -> Tpu:
  """The TPU of the mesh in use, else the default device, else a v5e.

  Programs lowered for a TPU from elsewhere name it by `jax.set_mesh`, or are
  compiled by `tpu_compiler`, which tells.
  """
  try:
    info = pltpu.get_tpu_info()
    version = info.chip_version
    name = _NAMES[getattr(version, 'name', str(version))]
    vmem_bytes = info.vmem_capacity_bytes
  except (KeyError, ValueError, NotImplementedError):
    name, vmem_bytes = 'v5e', _V5E_VMEM_BYTES
  return Tpu(name, int(vmem_bytes * (1 - _MARGIN)))


def default_gpu() -> jax.Device | None:
  """JAX's first device, if it is a GPU."""
  device = jax.devices()[0]
  return device if device.platform == 'gpu' else None
