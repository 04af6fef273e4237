"""quantized_matmul for Hopper: eight bits multiplied, or widened in registers.

Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323, section 4 (one kernel
that dequantises on the way to the product); Dettmers et al., "LLM.int8()",
https://arxiv.org/abs/2208.07339, section 2.1 (integer product, scales outside).

Where both sides have the same eight bits and there are many rows, WGMMA
multiplies them (`pallas_gpu_narrow`). Otherwise weights are widened to bfloat16
in registers (`pallas_gpu_widened`), on their way to WGMMA. That includes few
rows of rounded activations, whose values bfloat16 holds exactly. Activations
are rounded by XLA before the kernel.

Deviations: none in four-bit weights, which are scaled in float32 after each
group's product, unlike in the other backends.

*Cost*: 2 M K N FLOPs, at twice the rate of bfloat16 where both sides have eight
bits. HBM, few rows: weights and scales once; x, from the second level of cache,
once per 128 columns; where blocks share K, `splits` float32 results, written
and read. Many rows: weights about once per 8 tiles of rows. Where both sides
have eight bits XLA transposes the matrix first, which writes and reads it once
more, unless it is stored with K innermost. Rows that are no multiple of 8, K
that is none of 128 and N that is none of 64 are padded, which copies what has
them.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper
from pallas_kernels.common import hopper_matmul
from pallas_kernels.common import tuned
from pallas_kernels.quantized_matmul import pallas_gpu_narrow as narrow
from pallas_kernels.quantized_matmul import pallas_gpu_widened as widened
from pallas_kernels.quantized_matmul import quantize

_ALIGNMENT = 8
_COLUMNS = hopper.ROWS
# From how many rows on a transposed copy of the matrix costs less than the
# slower rate of bfloat16.
_MANY_ROWS = 512
# Tiles of so many rows do not share K.
_FEW_ROWS = 128
_BLOCK_ROWS = (8, 16, 32, 64, 128)
_LARGE_BLOCK_ROWS = 192
_DEPTH = 128
# Up to how many rows of x a step is twice as deep, for fewer instructions.
_MOST_ROWS_DEEP = 64
_MAX_SLOTS = 8
_MAX_SPLITS = 8
_ACROSS = 8
# Blocks of a cluster.
_PEERS = 2
# From how many rows on blocks share copies of x.
_SHARED_ROWS = 32


def quantized_matmul(
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  zero_points: jax.Array | None = None,
  *,
  activations: str | None = None,
  preferred_element_type: DTypeLike | None = None,
  config: Mapping[str, int] | None = None,
) -> jax.Array:
  """See `api.quantized_matmul`.

  Args:
    x: `[M, K]` bfloat16, or float32 if `activations` are rounded.
    weights: See there, as for the others.
    scales: See there.
    zero_points: See there.
    activations: See there.
    preferred_element_type: See there.
    config: At most, of the `Plan` of the kernel that runs: 'slots', at most,
      'across' and 'peers', and for `pallas_gpu_widened` also 'block_rows',
      'depth' and 'splits'; `None` is what is tuned.

  Returns:
    `[M, N]`.

  Raises:
    NotImplementedError: Dtypes that the kernels do not take.
  """
  out_dtype = jnp.dtype(preferred_element_type or x.dtype)
  _check(x, weights, activations, out_dtype)
  gpu = hopper.current()
  if config is None:
    described = features(x, weights, scales, activations=activations)
    config = tuned.lookup('quantized_matmul', gpu.name, described)
  is_narrow = _is_narrow(x, weights, activations)
  x_scales = None
  if activations is not None:
    x, x_scales = quantize.to_grid(x.astype(jnp.float32), activations, axis=1)
  if is_narrow:
    return _narrow(gpu, x, x_scales, weights, scales, out_dtype, config)
  x = x.astype(jnp.bfloat16)
  if x_scales is None:
    return _widened(gpu, x, weights, scales, zero_points, out_dtype, config)
  out = _widened(gpu, x, weights, scales, None, jnp.dtype('float32'), config)
  return (out * x_scales).astype(out_dtype)


def features(x, weights, scales, *_, activations=None, **__) -> dict[str, Any]:
  """What the best configuration depends on."""
  return dict(
    rows=x.shape[0],
    k=x.shape[1],
    n=weights.shape[1],
    dtype=x.dtype.name,
    weights=weights.dtype.name,
    groups=scales.shape[0] if scales.ndim > 1 else 1,
    activations=activations,
  )


def candidates(chip_name: str, *args: Any, **static: Any) -> list[dict]:
  """Configurations worth a try."""
  del chip_name
  x, weights = args[:2]
  if _is_narrow(x, weights, static.get('activations')):
    return [
      dict(slots=slots, across=across, peers=peers)
      for slots in (3, 4)
      for peers in (1, 2)
      for across in (4, 8, 16)
    ]
  if x.shape[0] <= _FEW_ROWS:
    return [
      dict(depth=depth, slots=slots, splits=splits, peers=peers, across=peers)
      for depth in (128, 256)
      for peers in (1, 2)
      for slots in (4, 6, 8)
      for splits in (1, 2, 4, 8)
    ]
  packed = weights.dtype == jnp.int32
  return [
    dict(block_rows=rows, across=across, peers=peers)
    for rows in ((64, 128) if packed else (128, 192, 256))
    for peers in (1, 2)
    for across in (4, 8, 16)
  ]


def _check(x, weights, activations, out_dtype):
  if 0 in (*x.shape, weights.size):
    raise NotImplementedError(f'empty x {x.shape} or weights {weights.shape}')
  if x.dtype != jnp.bfloat16 and (
    x.dtype != jnp.float32 or activations is None
  ):
    raise NotImplementedError(
      f'{x.dtype} activations, {activations=}: the kernels multiply bfloat16 '
      'and eight bits only'
    )
  if out_dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'a result of {out_dtype}')


def _is_narrow(x, weights, activations):
  """Whether eight bits are multiplied as they are."""
  if activations is None or x.shape[0] < _MANY_ROWS:
    return False
  # Sums of float8 have less than float32's precision.
  exact = activations == 'int8' or x.dtype == jnp.bfloat16
  return exact and weights.dtype == jnp.dtype(activations)


def _narrow(gpu, x, x_scales, weights, scales, out_dtype, config):
  (m, _), n = x.shape, weights.shape[1]
  block_m, block_n = narrow.BLOCKS[x.dtype.name]
  stage = narrow.CONSUMERS * hopper.ROWS * hopper_matmul.SWIZZLE
  plan = narrow.Plan(
    slots=hopper_matmul.slots_that_fit(
      narrow.slot_bytes(x.dtype),
      stage,
      config.get('slots', _MAX_SLOTS),
    ),
    across=config.get('across', _ACROSS),
    peers=config.get('peers', _PEERS),
    blocks=gpu.num_sms,
  )
  out = narrow.call(
    plan,
    _pad(x, _ALIGNMENT, narrow.DEPTH),
    _pad(x_scales.reshape(1, -1), 1, block_m)[0],
    _pad(weights.T, _COLUMNS, narrow.DEPTH),
    _pad(scales.astype(jnp.float32).reshape(1, -1), 1, block_n)[0],
    out_dtype,
  )
  return out[:m, :n]


def _widened(gpu, x, weights, scales, zero_points, out_dtype, config):
  (m, k), n = x.shape, weights.shape[1]
  packed = weights.dtype == jnp.int32
  group = k // scales.shape[0] if packed else 0
  plan = _widened_plan(
    gpu, (m, k, n), weights.dtype, group, zero_points, out_dtype, config
  )
  scales = scales.astype(jnp.float32).reshape(-1, n)
  scales = _pad(scales, 1, widened.BLOCK_N)
  if zero_points is not None:
    zero_points = zero_points.astype(jnp.float32)
    zero_points = _pad(zero_points, 1, widened.BLOCK_N)
  out = widened.call(
    plan,
    _pad(x, _ALIGNMENT, plan.depth),
    _pad(weights, _ALIGNMENT, _COLUMNS),
    scales if packed else scales[0],
    zero_points,
    out_dtype if plan.splits == 1 else jnp.dtype('float32'),
  )
  out = out[0] if plan.splits == 1 else jnp.sum(out, axis=0)
  return out[:m, :n].astype(out_dtype)


def _widened_plan(gpu, shape, dtype, group, zero_points, out_dtype, config):
  m, k, n = shape
  deep = m <= _MOST_ROWS_DEEP and k > _DEPTH
  depth = config.get('depth', (2 if deep else 1) * _DEPTH)
  # Few rows of x are little to read, and blocks wait for each other.
  alone = m < _SHARED_ROWS or m <= _FEW_ROWS and -(-n // widened.BLOCK_N) % 2
  peers = config.get('peers', 1 if alone else _PEERS)
  plan = widened.Plan(
    block_rows=config.get('block_rows', _block_rows(m, group)),
    depth=depth,
    slots=_MAX_SLOTS,
    splits=min(
      config.get('splits', _splits(gpu, shape, dtype)), -(-k // depth)
    ),
    across=config.get('across', peers if m <= _FEW_ROWS else _ACROSS),
    peers=peers,
    blocks=gpu.num_sms,
    group=group,
    has_zeros=zero_points is not None,
  )
  out_bytes = out_dtype.itemsize if plan.splits == 1 else 4
  slots = hopper_matmul.slots_that_fit(
    widened.slot_bytes(plan, dtype.itemsize),
    widened.stage_bytes(plan, out_bytes),
    config.get('slots', _MAX_SLOTS),
  )
  return dataclasses.replace(plan, slots=slots)


def _block_rows(m, group):
  """Rows of a tile."""
  # The sums of a group and of all groups both need registers.
  most = _BLOCK_ROWS[-2 if group == min(quantize.GROUP_SIZES) else -1]
  for rows in _BLOCK_ROWS:
    if m <= rows <= most:
      return rows
  large = -(-m // _LARGE_BLOCK_ROWS) * _LARGE_BLOCK_ROWS
  if not group and large <= 1.05 * m:
    return _LARGE_BLOCK_ROWS
  return most


def _splits(gpu, shape, dtype):
  """Blocks that share K, where there are few tiles."""
  m, k, n = shape
  if m > _FEW_ROWS:
    return 1
  tiles = -(-n // widened.BLOCK_N)
  bytes_per_value = 0.5 if dtype == jnp.int32 else 1

  def cost(splits):
    """Bytes, as if those of idle multiprocessors were read too."""
    blocks = tiles * splits
    waves = -(-blocks // gpu.num_sms)
    weights = bytes_per_value * k * n * waves * gpu.num_sms / blocks
    return weights + (8 * splits * m * n if splits > 1 else 0)

  return min(range(1, min(_MAX_SPLITS, -(-k // (2 * _DEPTH))) + 1), key=cost)


def _pad(array, row_multiple, column_multiple):
  """Pads a matrix with zeros to multiples."""
  rows = -array.shape[0] % row_multiple
  columns = -array.shape[1] % column_multiple
  if not rows and not columns:
    return array
  return jnp.pad(array, ((0, rows), (0, columns)))
