"""Peak arithmetic rate of the devices, for model FLOPs utilisation (MFU).

MFU is that of Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311,
appendix B: FLOPs the model needs over FLOPs the hardware could do.
"""

from collections.abc import Iterable
import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device, by the start of its `device_kind`;
# the first match counts. From the vendors' data sheets.
_PEAK_BF16 = (
  ('TPU v4', 275e12),
  ('TPU v5p', 459e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5', 459e12),
  ('TPU v6', 918e12),
  ('TPU v6e', 918e12),
  # A chip is two devices.
  ('TPU7x', 2307e12 / 2),
  ('TPU v7', 2307e12 / 2),
  ('NVIDIA A100', 312e12),
  ('NVIDIA H100 PCIe', 756e12),
  ('NVIDIA H100 NVL', 835e12),
  ('NVIDIA H100', 989e12),
  ('NVIDIA H200', 989e12),
  ('NVIDIA B200', 2250e12),
)


@dataclasses.dataclass(frozen=True)
class Peak:
  """What the devices could do at best.

  Attributes:
    flops_per_s: Of all of them together.
    source: Where the number is from, in words.
  """

  flops_per_s: float
  source: str


def peak(devices: Iterable[jax.Device]) -> Peak | None:
  """Peak rate of a mesh's devices.

  TPUs and GPUs are looked up. A CPU's is measured, with a float32 matrix
  product on all cores: simulated devices share them, so their number does not
  count, but the number of processes does.

  Returns:
    `None` for a device that is not in the table.
  """
  devices = list(devices)
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    processes = len({d.process_index for d in devices})
    local = next(d for d in devices if d.process_index == jax.process_index())
    rate = _measure_matmul(local)
    return Peak(processes * rate, 'measured float32 matrix product, CPU')
  for start, rate in _PEAK_BF16:
    if re.match(re.escape(start) + r'\b', kind):
      return Peak(rate * len(devices), f'{len(devices)} x {kind}, bf16 dense')
  return None


@functools.cache
def _measure_matmul(local, size=1024, repeats=5):
  a = jax.device_put(jnp.ones((size, size), jnp.float32), local)
  product = jax.jit(jnp.matmul)
  best = float('inf')
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(product(a, a))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
