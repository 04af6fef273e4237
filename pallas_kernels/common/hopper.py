"""What the Mosaic GPU kernels share: the GPU they are for, tiles, the call.

The kernels use TMA and WGMMA, which only compute capability 9.0 has (H100,
H200). NVIDIA, "Parallel Thread Execution ISA", sections on `cp.async.bulk`,
`mbarrier` and `wgmma`.

Only names that JAX 0.10 and 0.12 both have are used.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import inspect
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import chip

# Threads of a warpgroup: what one `thread_name` index of a kernel is.
WARPGROUP = 128
# Rows of a WGMMA, and of a warpgroup's share of a tile at the least.
ROWS = 64
# exp(x) is computed as 2 ** (x * LOG2_E).
LOG2_E = math.log2(math.e)

_NAMES = {'H100': 'h100', 'H200': 'h200', 'GH200': 'h200', 'H800': 'h100'}
_CAPABILITY = '9.0'
# Swizzles that TMA and WGMMA know, in bytes of the minor dimension.
_SWIZZLES = (128, 64, 32)


_INTERPRETED = jax.make_user_context(False)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU that the kernels run on.

  Attributes:
    name: As in `gpu_compiler.CHIPS` and `tuned.json`.
    num_sms: Streaming multiprocessors.
    smem_bytes: Shared memory that one block may take.
  """

  name: str
  num_sms: int = 132
  smem_bytes: int = 227 * 1024


def current() -> Gpu:
  """The GPU of this process, or an H200 where there is none.

  Without a GPU a program may be lowered for one elsewhere.

  Raises:
    NotImplementedError: It is not a Hopper GPU.
  """
  device = chip.default_gpu()
  if device is None:
    return Gpu('h200')
  capability = getattr(device, 'compute_capability', 'unknown')
  if capability != _CAPABILITY:
    raise NotImplementedError(
      f'{device.device_kind} has compute capability {capability}, and WGMMA '
      f'needs {_CAPABILITY}'
    )
  words = device.device_kind.replace('-', ' ').split()
  name = next((_NAMES[w] for w in words if w in _NAMES), 'h200')
  return Gpu(name, getattr(device, 'core_count', Gpu.num_sms))


@contextlib.contextmanager
def interpret(**params: Any) -> Iterator[None]:
  """A context in which the kernels run in JAX's interpreter, on any device.

  Args:
    **params: Of `plgpu.InterpretGPUParams`, such as `detect_races=True`.

  Raises:
    NotImplementedError: This JAX has none; JAX 0.12 has.
  """
  if not can_interpret():
    raise NotImplementedError(f'JAX {jax.__version__} has no GPU interpreter')
  params = plgpu.InterpretGPUParams(**params)
  with plgpu.force_gpu_interpret_mode(params), _INTERPRETED(True):
    yield


def can_interpret() -> bool:
  """Whether this JAX has an interpreter for GPU kernels."""
  return hasattr(plgpu, 'force_gpu_interpret_mode')


def is_interpreted() -> bool:
  """Whether `interpret` is on; the interpreter can't store to accumulators."""
  return _INTERPRETED.value


def transforms(
  minor: int, dtype: DTypeLike
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
  """How a tile lies in shared memory for TMA and WGMMA.

  Args:
    minor: Elements of the minor dimension.
    dtype: Of the elements.

  Raises:
    NotImplementedError: No swizzle divides the minor dimension.
  """
  itemsize = jnp.dtype(dtype).itemsize
  for swizzle in _SWIZZLES:
    if minor * itemsize % swizzle == 0:
      tiling = plgpu.TilingTransform((8, swizzle // itemsize))
      return tiling, plgpu.SwizzleTransform(swizzle)
  raise NotImplementedError(
    f'rows of {minor} {jnp.dtype(dtype).name} are not a multiple of '
    f'{_SWIZZLES[-1]} bytes'
  )


def tile(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
  """Scratch in shared memory whose last two dimensions TMA and WGMMA take."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype))


def kernel(
  body: Callable[..., None],
  *,
  name: str,
  out: Any,
  grid: dict[str, int],
  cluster: dict[str, int] | None = None,
  scratch: Any = (),
  warpgroups: int = 1,
  approx_math: bool = True,
) -> Callable[..., Any]:
  """A Mosaic GPU kernel, called with its input arrays.

  Args:
    body: Takes the refs of inputs, of `out`, and of `scratch`; the leaves of a
      dict come by name.
    name: Of the kernel in traces and profiles.
    out: Shapes of the results.
    grid: Blocks along each axis, by name, the fastest last; clusters of them,
      if any.
    cluster: Blocks of a cluster, along axes by name.
    scratch: Shared memory and barriers of a block.
    warpgroups: Of a block; `jax.lax.axis_index('wg')` tells which.
    approx_math: Whether exp2 and its like may use the approximate units.
  """
  return plgpu.kernel(
    body,
    out_type=out,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    cluster=tuple((cluster or {}).values()),
    cluster_names=tuple(cluster or {}),
    num_threads=warpgroups,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=approx_math,
      # The default from JAX 0.12 on.
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
  )


def load(ref: Any, index: Any, layout: Any) -> jax.Array:
  """Values of a ref, in shared or global memory, in a layout.

  Args:
    ref: Where they are.
    index: Which: the ints and `pl.ds` of an index.
    layout: Of `plgpu.Layout`.
  """
  if 'idx' in inspect.signature(plgpu.load).parameters:  # Before JAX 0.12.
    return plgpu.load(ref, index, layout=layout, optimized=False)
  return plgpu.load(ref.at[index], layout=layout, optimized=False)


class Accumulator:
  """A sum of products in a warpgroup's registers, which can be rescaled.

  The interpreter lacks stores to accumulators, and factors in registers: there
  the sum lies in shared memory.
  """

  def __init__(self, ref: Any):
    self._ref = ref

  def add(self, a: Any, b: Any) -> None:
    """Adds the product of `a` and `b`, in the background."""
    if not is_interpreted():
      plgpu.wgmma(self._ref, a, b)
      return

    def product(acc):
      plgpu.wgmma(acc, a, b)
      return acc[...]

    if isinstance(a, jax.Array):
      new = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
      plgpu.commit_smem()  # A WGMMA would have read as copies write.
    else:
      new = pl.run_scoped(product, plgpu.ACC(self._ref.shape))
    self._ref[...] += new

  def read(self) -> jax.Array:
    """Waits for all products, and returns the sum."""
    return self._ref[...]

  def write(self, value: jax.Array) -> None:
    """Replaces the sum."""
    self._ref[...] = value


def stand_ins(warpgroups: int, shape: tuple[int, int]) -> list[Any]:
  """Scratch for the accumulators of a block: nothing, save when interpreted."""
  if not is_interpreted():
    return []
  return [plgpu.SMEM((warpgroups, *shape), jnp.float32)]


def with_accumulator(
  function: Callable[[Accumulator], Any], shape: tuple[int, int], *stand_in: Any
) -> Any:
  """Calls `function` with an accumulator of zeros.

  Args:
    function: Of one warpgroup.
    shape: Of the sum, float32.
    *stand_in: The warpgroup's part of what `stand_ins` is allocated as.
  """
  if is_interpreted():
    [ref] = stand_in
    ref[...] = jnp.zeros(shape, jnp.float32)
    return function(Accumulator(ref))
  return pl.run_scoped(lambda ref: function(Accumulator(ref)), plgpu.ACC(shape))
