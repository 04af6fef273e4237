"""GPUs that programs are compiled for, and how fast they could be.

Peaks are NVIDIA's published ones for dense products (H100 and H200 SXM data
sheets). A product of 64 x N x 16 bfloat16 keeps the tensor cores of an SM busy
for N / 2 cycles: the peak divided by SMs and boost clock is 4096 FLOPs a cycle.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One GPU.

  Attributes:
    name: As in `hopper.Gpu` and `tuned.json`.
    description: What the driver calls it.
    num_sms: Streaming multiprocessors.
    clock_ghz: Boost clock.
    bf16_tflops: Peak of dense bfloat16 products; fp8 has twice that.
    gb_per_s: Peak bandwidth of the memory, 1e9 bytes per second.
    memory_bytes: Its size.
  """

  name: str
  description: str
  num_sms: int
  clock_ghz: float
  bf16_tflops: float
  gb_per_s: float
  memory_bytes: int

  @property
  def target_config(self) -> str:
    """XLA's description of it, as the text of a `GpuTargetConfigProto`."""
    return _TARGET.format(
      core_count=self.num_sms,
      clock=self.clock_ghz,
      bandwidth=round(self.gb_per_s * 1e9),
      memory=self.memory_bytes,
      description=self.description,
    )


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('h100', 'NVIDIA H100 80GB HBM3', 132, 1.83, 989.4, 3352.0, 80 * 2**30),
    Chip('h200', 'NVIDIA H200', 132, 1.83, 989.4, 4800.0, 141 * 10**9),
  )
}

# The limits are those of compute capability 9.0.
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: {core_count}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{description}"
"""
