"""rms_norm on a TPU: one pass over HBM in each direction.

A block of rows is in VMEM; a few of them at a time are read twice from there,
once for the sums along a row and once for the result. The gradient of scale,
which XLA sums in a pass of its own, is accumulated in VMEM while the rows pass.

Cost: forward 2 T D elements of HBM, 4 T D with a residual; backward 3 T D, 4 T
D with the gradient of the sum. VMEM: two blocks of each array.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.rms_norm.features import features
from pallas_kernels.rms_norm.gradient import differentiable

# Rows in registers at a time: a bfloat16 tile.
_ROWS = 16
_LANES = 128
# Columns of them; the backward pass has twice the arrays.
_COLUMNS, _BACKWARD_COLUMNS = 2048, 1024
_BLOCK_BYTES = 2**21
# Shares of the rows, for chips where two cores work as one.
_PARTS = 2


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None = None,
  **kwargs: Any,
) -> Any:
  """See `api.rms_norm`."""
  return differentiable(
    functools.partial(rms_norm_forward, **kwargs),
    functools.partial(rms_norm_backward, **kwargs),
    x,
    scale,
    residual,
  )


def candidates(chip, x, scale, *args, **kwargs) -> list[dict[str, int]]:
  """Configurations for the tuner to try."""
  del chip, x, scale, args, kwargs
  return [dict(block_rows=n) for n in (64, 128, 256, 512)]


backward_features = features
backward_candidates = candidates


def rms_norm_forward(
  x: jax.Array,
  scale: jax.Array,
  residual: jax.Array | None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The norm, and the sum that it is of."""
  x, scale, residual = varying.vary_alike(x, scale, residual)
  arrays = [a.reshape(-1, x.shape[-1]) for a in (x, residual) if a is not None]
  rows, width = arrays[0].shape
  block_rows = _block_rows('rms_norm_forward', x, rows, config)
  spec = pl.BlockSpec((block_rows, width), lambda i: (i, 0))
  outputs = pl.pallas_call(
    functools.partial(_forward_kernel, epsilon=epsilon),
    grid=(pl.cdiv(rows, block_rows),),
    in_specs=[pl.BlockSpec((1, width), lambda i: (0, 0))]
    + [spec] * len(arrays),
    out_specs=[spec] * len(arrays),
    out_shape=[varying.shape((rows, width), x.dtype, x)] * len(arrays),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',),
      vmem_limit_bytes=chip_lib.current().vmem_bytes,
    ),
    name='rms_norm_forward',
  )(_gain(scale, plus_one), *arrays)
  outputs = [a.reshape(x.shape) for a in outputs]
  return outputs[0], x if residual is None else outputs[1]


def rms_norm_backward(
  total: jax.Array,
  scale: jax.Array,
  d_norm: jax.Array,
  d_total: jax.Array | None,
  *,
  epsilon: float = 1e-6,
  plus_one: bool = False,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of the sum and of scale."""
  total, scale, d_norm, d_total = varying.vary_alike(
    total, scale, d_norm, d_total
  )
  width = total.shape[-1]
  arrays = [
    a.reshape(-1, width) for a in (total, d_norm, d_total) if a is not None
  ]
  rows = len(arrays[0])
  block_rows = _block_rows('rms_norm_backward', total, rows, config)
  num_blocks = pl.cdiv(rows, block_rows)
  parts = math.gcd(_PARTS, num_blocks)
  steps = num_blocks // parts
  spec = pl.BlockSpec((block_rows, width), lambda p, i: (p * steps + i, 0))
  d_total, d_scale = pl.pallas_call(
    functools.partial(_backward_kernel, epsilon=epsilon, num_rows=rows),
    grid=(parts, steps),
    in_specs=[pl.BlockSpec((1, width), lambda p, i: (0, 0))]
    + [spec] * len(arrays),
    out_specs=[
      spec,
      pl.BlockSpec((None, _ROWS, width), lambda p, i: (p, 0, 0)),
    ],
    out_shape=[
      varying.shape((rows, width), total.dtype, total),
      varying.shape((parts, _ROWS, width), jnp.float32, total),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=chip_lib.current().vmem_bytes,
    ),
    name='rms_norm_backward',
  )(_gain(scale, plus_one), *arrays)
  return (
    d_total.reshape(total.shape),
    d_scale.sum((0, 1)).astype(scale.dtype),
  )


def _gain(scale, plus_one):
  return (scale.astype(jnp.float32) + (1.0 if plus_one else 0.0))[None]


def _block_rows(function, x, rows, config):
  chip = chip_lib.current()
  if config is None:
    config = tuned.lookup(
      'rms_norm', chip.name, features(x, None), function=function
    )
  row_bytes = x.shape[-1] * x.dtype.itemsize
  most = min(_BLOCK_BYTES, chip.vmem_bytes // 16) // row_bytes
  block_rows = min(config.get('block_rows', most), most, rows)
  return max(-(-block_rows // _ROWS) * _ROWS, _ROWS)


def _over_columns(width, most, body, init):
  """Folds `body(slice, carry)` over slices of whole lanes, or an odd width.

  Unrolled, the loop would hold more of a row than there are registers.
  """
  step = width if width % _LANES else math.gcd(width, most)
  return jax.lax.fori_loop(
    0,
    width // step,
    lambda i, carry: body(pl.ds(pl.multiple_of(i * step, step), step), carry),
    init,
  )


def _lanes(width):
  return width if width % _LANES else _LANES


def _fold(a):
  """Sums of [rows, n * 128] over n."""
  parts = [a[:, k : k + _LANES] for k in range(0, a.shape[1], _LANES)]
  return sum(parts[1:], parts[0]) if a.shape[1] % _LANES == 0 else a


def _forward_kernel(gain_ref, *refs, epsilon):
  half = len(refs) // 2
  x_refs, (norm_ref, *total_ref) = refs[:half], refs[half:]
  block_rows, width = norm_ref.shape
  source = total_ref[0] if total_ref else x_refs[0]

  def normalise(r, _):
    rows = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)

    def measure(part, square):
      h = x_refs[0][rows, part].astype(jnp.float32)
      if total_ref:
        h = h + x_refs[1][rows, part].astype(jnp.float32)
        total = h.astype(norm_ref.dtype)
        total_ref[0][rows, part] = total
        h = total.astype(jnp.float32)
      return square + _fold(h * h)

    square = _over_columns(
      width, _COLUMNS, measure, jnp.zeros((_ROWS, _lanes(width)), jnp.float32)
    )
    mean = jnp.sum(square, axis=1, keepdims=True) * (1 / width)
    inverse = jax.lax.rsqrt(mean + epsilon)

    def write(part, _):
      norm = source[rows, part].astype(jnp.float32) * inverse
      norm = norm * gain_ref[:, part]
      norm_ref[rows, part] = norm.astype(norm_ref.dtype)
      return 0

    _over_columns(width, _COLUMNS, write, 0)
    return 0

  jax.lax.fori_loop(0, block_rows // _ROWS, normalise, 0)


def _backward_kernel(gain_ref, total_ref, d_norm_ref, *refs, epsilon, num_rows):
  *more, d_total_ref, d_scale_ref = refs
  block_rows, width = total_ref.shape
  block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

  @pl.when(pl.program_id(1) == 0)
  def _():
    d_scale_ref[...] = jnp.zeros_like(d_scale_ref)

  def differentiate(r, _):
    rows = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)

    def measure(part, sums):
      square, along = sums
      h = total_ref[rows, part].astype(jnp.float32)
      d_unit = d_norm_ref[rows, part].astype(jnp.float32) * gain_ref[:, part]
      return square + _fold(h * h), along + _fold(d_unit * h)

    zero = jnp.zeros((_ROWS, _lanes(width)), jnp.float32)
    square, along = _over_columns(
      width, _BACKWARD_COLUMNS, measure, (zero, zero)
    )
    mean = jnp.sum(square, axis=1, keepdims=True) * (1 / width)
    inverse = jax.lax.rsqrt(mean + epsilon)
    along = jnp.sum(along, axis=1, keepdims=True) * (1 / width) * inverse
    row = jax.lax.broadcasted_iota(jnp.int32, (_ROWS, 1), 0)
    is_row = row < num_rows - block * block_rows - r * _ROWS

    def write(part, _):
      unit = total_ref[rows, part].astype(jnp.float32) * inverse
      d_norm = d_norm_ref[rows, part].astype(jnp.float32)
      d_h = inverse * (d_norm * gain_ref[:, part] - unit * along)
      if more:
        d_h = d_h + more[0][rows, part].astype(jnp.float32)
      d_total_ref[rows, part] = d_h.astype(d_total_ref.dtype)
      d_scale_ref[:, part] += jnp.where(is_row, d_norm * unit, 0.0)
      return 0

    _over_columns(width, _BACKWARD_COLUMNS, write, 0)
    return 0

  jax.lax.fori_loop(0, block_rows // _ROWS, differentiate, 0)
