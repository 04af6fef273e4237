"""quantized_matmul for TPUs: weights cross HBM as they are stored.

Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323, section 4 (one kernel
that dequantises on the way to the product); Dettmers et al., "LLM.int8()",
https://arxiv.org/abs/2208.07339, section 2.1 (integer product, scales outside).

A grid step is a block of rows of x and a block of columns of the matrix. What
is not multiplied as it is stored is widened in VMEM: for many rows once per
block of columns, kept for all blocks of rows; for few rows a piece at a time
between the products, so that the vector unit works beside the matrix unit.
Eight-bit matrices are scaled after the product; four-bit ones before it, in
float32. Activations are rounded by XLA before the kernel.

Deviations: four-bit weights are rounded to the dtype of x once scaled. Where a
chip has no matrix unit for int8 or float8, both sides are widened to bfloat16,
which is exact.

*Cost*: 2 M K N FLOPs, of integers with int8 activations; K N conversions. HBM:
weights and scales once, the result once, x once per block of columns. VMEM: two
blocks of each and one widened block of columns.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.quantized_matmul import quantize

_LANES = 128
# Chips whose matrix units multiply them.
_MULTIPLIES = {'int8': ('v5e', 'v5p', 'v6e'), 'float8_e4m3fn': ('tpu7x',)}
_DEPTH = {'v6e': 256, 'tpu7x': 2048}
_SPARE_BYTES = 2**21
# Rows and columns that are widened together: what registers can hold.
_PIECE_ROWS, _PIECE_COLUMNS = 128, 256
# What bits of a bfloat16 that count 1 are added to.
_BASE = 128
_WORDS = quantize.PACKED_ROWS // quantize.VALUES_PER_WORD


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes of one call.

  Attributes:
    block_rows: Rows of x in a block.
    num_m: Blocks of rows.
    block_n: Columns of the matrix in a block.
    num_n: Blocks of columns.
    piece: Columns of one product.
    depth: Rows of the matrix whose products the compiler is given to add up.
    dtype: What is multiplied.
    packed: Whether the matrix is packed.
    group: Rows with one scale, or 0 for all.
    has_zeros: Whether there are zero points.
    by_bits: Whether packed values are widened without arithmetic.
  """

  block_rows: int
  num_m: int
  block_n: int
  num_n: int
  piece: int
  depth: int
  dtype: Any
  packed: bool
  group: int
  has_zeros: bool
  by_bits: bool


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
    x: `[M, K]`.
    weights: See there, as for the others.
    scales: See there.
    zero_points: See there.
    activations: See there.
    preferred_element_type: See there.
    config: At most 'block_rows', 'block_n', 'piece' and 'depth' of the plan;
      `None` is what is tuned.

  Returns:
    `[M, N]`.

  Raises:
    NotImplementedError: Dtypes that the kernel does not take, or a K of which
      VMEM does not hold 128 columns.
  """
  if x.dtype not in (jnp.bfloat16, jnp.float32) or 0 in (
    *x.shape,
    weights.size,
  ):
    raise NotImplementedError(f'{x.dtype} activations {x.shape}')
  out_dtype = jnp.dtype(preferred_element_type or x.dtype)
  tpu = chip_lib.current()
  if config is None:
    described = features(x, weights, scales, activations=activations)
    config = tuned.lookup('quantized_matmul', tpu.name, described)
  dtype, x_scales = x.dtype, None
  if activations is not None:
    native = weights.dtype == jnp.dtype(activations)
    native &= tpu.name in _MULTIPLIES[activations]
    dtype = jnp.dtype(activations if native else jnp.bfloat16)
    x, x_scales = quantize.to_grid(x.astype(jnp.float32), activations, axis=1)
    x = x.astype(dtype)
  packed = weights.dtype == jnp.int32
  plan = _plan(
    tpu,
    x,
    weights,
    out_dtype,
    config,
    dtype=jnp.dtype(dtype),
    packed=packed,
    group=x.shape[1] // scales.shape[0] if packed else 0,
    has_zeros=zero_points is not None,
    by_bits=packed and x.dtype == jnp.bfloat16 and x.shape[0] <= _LANES,
  )
  scales = scales.astype(jnp.float32).reshape(-1, weights.shape[1])
  operands = [x, weights, scales]
  if zero_points is not None:
    # Read as a whole they are widened in the kernel, which is less to copy.
    operands.append(
      zero_points if plan.by_bits else zero_points.astype(jnp.float32)
    )
  if x_scales is not None:
    operands.append(x_scales)
  if plan.by_bits:
    operands[0], sums = _in_order_of_halves(x, plan.group)
    operands.append(sums)
  return _call(plan, operands, out_dtype)


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
  del static
  depth = _DEPTH.get(chip_name, _LANES)
  few = args[0].shape[0] <= _LANES
  return [
    dict(block_rows=rows, block_n=n, piece=piece, depth=depth)
    for rows in ((_LANES,) if few else (512, 1024))
    for n in (512, 1024, 2048)
    for piece in (256, 512)
  ]


def _plan(tpu, x, weights, out_dtype, config, **rest):
  m, k = x.shape
  n = weights.shape[1]
  rows = config.get('block_rows', 1024 if tpu.name in _DEPTH else 512)
  rows = min(rows, _round_up(m, 32))
  block_n = config.get('block_n', 1024 if m > _LANES or rest['packed'] else 512)
  block_n = min(block_n, _round_up(n, _LANES))
  width = _round_up(k, _LANES)
  widened = rest['dtype'] != weights.dtype
  depth = config.get('depth', _DEPTH.get(tpu.name, _LANES))

  def needed(rows, block_n):
    each = 2 * weights.dtype.itemsize * weights.shape[0]
    each += widened * rest['dtype'].itemsize * width
    each += 2 * rows * out_dtype.itemsize + 4 * rows
    each += 16 * max(width // rest['group'], 8) if rest['group'] else 64
    lanes = 2 * rows * _LANES * 4  # Scales of rows.
    return each * block_n + 2 * rows * width * x.dtype.itemsize + lanes

  budget = tpu.vmem_bytes - _SPARE_BYTES
  while needed(rows, block_n) > budget:
    if block_n <= _LANES and rows <= 32:
      raise NotImplementedError(f'K={k} of {weights.dtype} in {budget} bytes')
    if rows >= block_n or block_n <= _LANES:
      rows = _round_up(rows // 2, 32)
    else:
      block_n = _round_up(block_n // 2, _LANES)
  piece = min(
    config.get('piece', 512 if m > _LANES or rest['packed'] else 256), block_n
  )
  block_n = _round_up(block_n, piece)
  return _Plan(
    block_rows=rows,
    num_m=-(-m // rows),
    block_n=block_n,
    num_n=-(-n // block_n),
    piece=piece,
    depth=_round_up(depth, _LANES),
    **rest,
  )


def _call(plan, operands, out_dtype):
  x, weights, scales = operands[:3]
  block_n = plan.block_n
  per_column = lambda a: pl.BlockSpec(
    (a.shape[0], block_n), lambda n, m: (0, n)
  )
  in_specs = [
    pl.BlockSpec((plan.block_rows, x.shape[1]), lambda n, m: (m, 0)),
    *(per_column(a) for a in operands[1 : 3 + plan.has_zeros]),
  ]
  if len(operands) > len(in_specs):
    in_specs.append(
      pl.BlockSpec(
        (plan.block_rows, operands[-1].shape[1]), lambda n, m: (m, 0)
      )
    )
  scratch = [pltpu.VMEM((plan.block_rows, block_n), _sum_dtype(plan.dtype))]
  if plan.by_bits:
    scratch = [pltpu.VMEM((x.shape[1], plan.piece), plan.dtype)]
  elif plan.dtype != weights.dtype:
    scratch.append(pltpu.VMEM((x.shape[1], block_n), plan.dtype))
  return pl.pallas_call(
    functools.partial(
      _by_bits_kernel if plan.by_bits else _quantized_matmul_kernel,
      plan=plan,
    ),
    grid=(plan.num_n, plan.num_m),
    in_specs=in_specs,
    out_specs=pl.BlockSpec((plan.block_rows, block_n), lambda n, m: (m, n)),
    scratch_shapes=scratch,
    out_shape=varying.shape((x.shape[0], weights.shape[1]), out_dtype, x),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=chip_lib.current().vmem_bytes,
    ),
    name='quantized_matmul',
  )(*operands)


def _quantized_matmul_kernel(*refs, plan):
  """One block of the result; `refs` are as in `_call`."""
  x_ref, weights, scales, *refs = refs
  zeros = refs.pop(0) if plan.has_zeros else None
  wide = refs.pop() if plan.dtype != weights.dtype else None
  sums = refs.pop()
  out_ref = refs.pop()
  x_scales = refs.pop() if refs else None
  k = x_ref.shape[1]
  is_first = pl.program_id(1) == 0

  def widen(first, rows, columns):
    """Writes rows of the matrix from `first` on into `wide`."""
    if plan.packed:
      return _unpack(plan, weights, scales, zeros, wide, first, rows, columns)
    for top in range(0, rows, _PIECE_ROWS):
      at = pl.ds(first + top, min(_PIECE_ROWS, rows - top)), columns
      wide[*at] = weights[*at].astype(jnp.float32).astype(wide.dtype)

  def each_piece(body):
    if plan.block_n == plan.piece:
      return body(pl.ds(0, plan.piece))

    @pl.loop(0, plan.block_n // plan.piece)
    def _(c):
      body(pl.ds(pl.multiple_of(c * plan.piece, plan.piece), plan.piece))

  matrix = weights if wide is None else wide

  def multiply(columns):
    in_between = wide is not None and plan.num_m == 1
    for start in range(0, k, plan.depth):
      deep = min(plan.depth, k - start)
      if in_between:
        widen(start, deep, columns)
      ks = pl.ds(start, deep)
      total = _dot(x_ref[:, ks], matrix[ks, columns])
      if start:
        total += sums[:, columns]
      if start + deep < k:
        sums[:, columns] = total
    total = total.astype(jnp.float32)
    if not plan.packed:
      total *= scales[:, columns]
    if x_scales is not None:
      total *= x_scales[...]
    out_ref[:, columns] = total.astype(out_ref.dtype)

  if wide is not None and plan.num_m > 1:

    @pl.when(is_first)
    def _():
      each_piece(lambda columns: _in_blocks(k, columns, widen))

  each_piece(multiply)


def _in_order_of_halves(x, group):
  """x with its columns as `_by_bits_kernel` has rows; sums of groups."""
  m, k = x.shape
  sums = jnp.sum(x.astype(jnp.float32).reshape(m, -1, group), axis=2)
  halves = x.reshape(m, -1, 2, _WORDS).swapaxes(2, 3)
  return halves.reshape(m, k), sums


def _by_bits_kernel(x_ref, words, scales, *refs, plan):
  """Few rows: bits of packed values become bfloat16 without arithmetic.

  The 16 bits 0x4300 are 128, and its last bit counts 1: a value v in the last
  four makes 128 + v. Scales, and the constant, are taken care of after the
  product of each group: for fewer than a group's rows that is less work.
  """
  zeros = refs[0] if plan.has_zeros else None
  x_sums, out_ref, wide = refs[-3:]

  @pl.loop(0, plan.block_n // plan.piece)
  def _(c):
    columns = pl.ds(pl.multiple_of(c * plan.piece, plan.piece), plan.piece)
    offset = _BASE + quantize.OFFSET
    offsets = offset
    if zeros is not None:
      offsets = zeros[:, columns].astype(jnp.float32) + offset
    total = -_dot(x_sums[...], scales[:, columns] * offsets)
    for group in range(scales.shape[0]):
      ks = pl.ds(group * plan.group, plan.group)
      for row in range(ks.start, ks.start + ks.size, 2 * _WORDS):
        block, within = divmod(row, quantize.PACKED_ROWS)
        packed = words[pl.ds(block * _WORDS, _WORDS), columns]
        bits = (packed >> (within // 8)) & 0x000F000F | 0x43004300
        wide[pl.ds(row, 2 * _WORDS), :] = pltpu.bitcast(bits, jnp.bfloat16)
      product = _dot(x_ref[:, ks], wide[ks, :])
      total += product * scales[pl.ds(group, 1), columns]
    out_ref[:, columns] = total.astype(out_ref.dtype)


def _in_blocks(k, columns, body):
  """Calls `body(first, rows, columns)` for all rows of the matrix."""
  rows = _PIECE_ROWS
  if k >= rows:

    @pl.loop(0, k // rows)
    def _(i):
      body(pl.multiple_of(i * rows, rows), rows, columns)

  if k % rows:
    body(k // rows * rows, k % rows, columns)


def _unpack(plan, words, scales, zeros, wide, first, rows, columns):
  """Widens packed rows; `first` and `rows` are multiples of 128."""
  mask = 2 ** (32 // quantize.VALUES_PER_WORD) - 1
  for block in range(0, rows, quantize.PACKED_ROWS):
    top = first + block
    at = top // quantize.VALUES_PER_WORD
    if not isinstance(top, int):
      at = pl.multiple_of(at, _WORDS)
    packed = words[pl.ds(at, _WORDS), columns]
    for j in range(quantize.VALUES_PER_WORD):
      row = top + j * _WORDS
      group = row // plan.group
      value = ((packed >> quantize.SHIFTS[j]) & mask).astype(jnp.float32)
      if zeros is None:
        value -= quantize.OFFSET
      else:
        value -= zeros[pl.ds(group, 1), columns] + quantize.OFFSET
      value *= scales[pl.ds(group, 1), columns]
      if not isinstance(row, int):
        row = pl.multiple_of(row, _WORDS)
      wide[pl.ds(row, _WORDS), columns] = value.astype(wide.dtype)


def _dot(a, b):
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (0,)), ((), ())),
    preferred_element_type=_sum_dtype(a.dtype),
    precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
  )


def _sum_dtype(dtype):
  return jnp.int32 if dtype == jnp.int8 else jnp.float32


def _round_up(number, multiple):
  return -(-number // multiple) * multiple
