"""grouped_matmul for TPUs: block-sparse products over a run-time work list.

Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts",
https://arxiv.org/abs/2211.15841, section 5. The result and the gradient of the
rows are `product`, which reads matrices as they are or transposed, without a
copy; the gradient of the matrices is `weight_gradient`.

Deviations: bfloat16 rows have their cotangent rounded to bfloat16 too. Float32
operands multiply in full precision. Quantised matrices are widened in VMEM,
once per use of a matrix, not once per block of rows.

*Cost*: 2 M K N FLOPs, and again for each gradient; a boundary inside a block
adds at most `part_rows` rows. HBM: lhs, matrices of groups that have rows, and
the result once, as far as VMEM holds whole matrices; else lhs once per block of
N. The gradient of the matrices likewise. A width that is no multiple of 128 and
that VMEM cannot hold whole is padded, which copies the matrices.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import chip as chip_lib
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.common.gradient import with_gradient
from pallas_kernels.grouped_matmul import product
from pallas_kernels.grouped_matmul import weight_gradient

_LANES = 128
# Two cores work as one: each takes half of the columns.
_MEGACORE = ('v4', 'v5p')
# Rows of a matrix unit. A tpu7x sums up inside of it.
_DEPTH = {'v6e': 256, 'tpu7x': 2048}
_BLOCK_ROWS = {'v6e': 1024, 'tpu7x': 1024, 'v4': 256}
_PART_ROWS = 256
_MIN_BLOCK_N = 512
# Left to the compiler, beside what `chip` leaves.
_SPARE_BYTES = 2**20


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None = None,
  *,
  preferred_element_type: DTypeLike | None = None,
  config: Mapping[str, int] | None = None,
) -> jax.Array:
  """See `api.grouped_matmul`; `config` is as in `grouped_matmul_forward`."""
  static = dict(preferred_element_type=preferred_element_type)

  def forward(*args):
    return grouped_matmul_forward(*args, **static, config=config), args

  def backward(residuals, d_out):
    d_lhs, d_rhs = grouped_matmul_backward(*residuals, d_out, **static)
    return d_lhs, d_rhs, None, None

  args = varying.vary_alike(lhs, rhs, group_sizes, rhs_scales)
  return with_gradient(forward, backward, *args)


def grouped_matmul_forward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None = None,
  *,
  preferred_element_type: DTypeLike | None = None,
  config: Mapping[str, int] | None = None,
) -> jax.Array:
  """The result, without a derivative; all arguments vary alike.

  Args:
    lhs: See `api.grouped_matmul`, as for the others.
    rhs: See there.
    group_sizes: See there.
    rhs_scales: See there.
    preferred_element_type: See there.
    config: At most, of `product.Plan`: 'block_rows', 'part_rows', 'depth',
      'chunk' and 'block_n', columns in VMEM together; `None` is what is tuned.

  Returns:
    See there.

  Raises:
    NotImplementedError: Dtypes that the kernel does not take.
  """
  _check(lhs, rhs)
  out_dtype = jnp.dtype(preferred_element_type or lhs.dtype)
  return _multiply(lhs, rhs, group_sizes, rhs_scales, out_dtype, False, config)


def grouped_matmul_backward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None,
  d_out: jax.Array,
  *,
  preferred_element_type: DTypeLike | None = None,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Gradients of `lhs` and of `rhs`; the latter is `None` if it has scales.

  Args:
    lhs: See `api.grouped_matmul`, as for the next three.
    rhs: See there.
    group_sizes: See there.
    rhs_scales: See there.
    d_out: Cotangent of the result.
    preferred_element_type: See there.
    config: For the gradient of `rhs`; at most, of `weight_gradient.Plan`:
      'block_rows', 'part_rows', 'block_k', 'block_n', 'chunk_k', 'piece' and
      'depth'; `None` is what is tuned.

  Returns:
    Arrays as `lhs` and as `rhs`.

  Raises:
    NotImplementedError: Dtypes that the kernels do not take.
  """
  del preferred_element_type
  _check(lhs, rhs)
  d_out = d_out.astype(lhs.dtype)
  d_lhs = _multiply(d_out, rhs, group_sizes, rhs_scales, lhs.dtype, True, None)
  if rhs_scales is not None:
    return d_lhs, None
  if 0 in lhs.shape or 0 in rhs.shape:
    return d_lhs, varying.zeros(rhs.shape, rhs.dtype, lhs)
  tpu = chip_lib.current()
  if config is None:
    config = tuned.lookup(
      'grouped_matmul',
      tpu.name,
      backward_features(lhs, rhs),
      function='grouped_matmul_backward',
    )
  plan = _gradient_plan(tpu, lhs, rhs, config)
  d_rhs = weight_gradient.call(plan, lhs, d_out, group_sizes, rhs.dtype)
  return d_lhs, d_rhs


def features(lhs, rhs, *_, transposed=False, **__) -> dict[str, Any]:
  """What the best configuration depends on."""
  return dict(
    rows=lhs.shape[0],
    k=rhs.shape[2 if transposed else 1],
    n=rhs.shape[1 if transposed else 2],
    groups=rhs.shape[0],
    dtype=lhs.dtype.name,
    matrices=rhs.dtype.name,
    transposed=transposed,
  )


def candidates(chip_name: str, *args: Any, **static: Any) -> list[dict]:
  """Configurations worth a try."""
  del static
  lhs, rhs = args[:2]
  depth = _DEPTH.get(chip_name, _LANES)
  return [
    dict(block_rows=rows, part_rows=part, depth=depth, chunk=chunk, block_n=n)
    for rows in (256, 512, 1024)
    if rows < 2 * lhs.shape[0] or rows == 256
    for part in (128, 256)
    for chunk in (256, 512, 1024)
    for n in {rhs.shape[2], rhs.shape[2] // 2}
  ]


def backward_features(lhs, rhs, *_, **__) -> dict[str, Any]:
  """What the best configuration of the gradient of `rhs` depends on."""
  num_groups, k, n = rhs.shape
  return dict(
    rows=lhs.shape[0], k=k, n=n, groups=num_groups, dtype=lhs.dtype.name
  )


def backward_candidates(
  chip_name: str, *args: Any, **static: Any
) -> list[dict]:
  """Configurations of the gradient of `rhs` worth a try."""
  del static
  _, rhs = args[:2]
  depth = _DEPTH.get(chip_name, _LANES)
  return [
    dict(
      block_rows=rows,
      part_rows=128,
      block_k=k,
      block_n=n,
      chunk_k=chunk,
      piece=512,
      depth=depth,
    )
    for rows in (256, 512, 1024)
    for k in {rhs.shape[1], 1024}
    for n in {rhs.shape[2], 2048, 1024}
    for chunk in (256, 512)
  ]


def _check(lhs, rhs):
  narrow = rhs.dtype.itemsize == 1
  if lhs.dtype not in (jnp.bfloat16, jnp.float32) or not (
    narrow or rhs.dtype == lhs.dtype
  ):
    raise NotImplementedError(f'rows of {lhs.dtype}, matrices of {rhs.dtype}')


def _multiply(lhs, rhs, sizes, scales, out_dtype, transposed, config):
  """Rows times matrices, or times transposed ones."""
  num_rows, width = lhs.shape[0], rhs.shape[1 if transposed else 2]
  if 0 in lhs.shape or 0 in rhs.shape:
    return varying.zeros((num_rows, width), out_dtype, lhs)
  tpu = chip_lib.current()
  if config is None:
    described = features(lhs, rhs, transposed=transposed)
    config = tuned.lookup('grouped_matmul', tpu.name, described)
  shape = _Shape(
    rows=num_rows,
    k=lhs.shape[1],
    n=width,
    bytes_lhs=lhs.dtype.itemsize,
    bytes_rhs=rhs.dtype.itemsize,
    bytes_out=out_dtype.itemsize,
    scaled=scales is not None,
    transposed=transposed,
  )
  plan = _product_plan(tpu, shape, config)
  if plan is None:  # Neither fits whole nor can be cut.
    shape = dataclasses.replace(
      shape, k=_round_up(shape.k, _LANES), n=_round_up(shape.n, _LANES)
    )
    plan = _product_plan(tpu, shape, config)
    if plan is None:
      raise NotImplementedError(f'{shape} in {tpu.vmem_bytes} bytes of VMEM')
    k, n = shape.k - lhs.shape[1], shape.n - width
    k_n = ((0, n), (0, k)) if transposed else ((0, k), (0, n))
    lhs = jnp.pad(lhs, ((0, 0), (0, k)))
    rhs = jnp.pad(rhs, ((0, 0), *k_n))
    if scales is not None:
      scales = jnp.pad(scales, ((0, 0), k_n[1]))
  if scales is not None:
    scales = scales.astype(jnp.float32)[:, None]
  name = 'grouped_matmul_d_lhs' if transposed else 'grouped_matmul'
  out = product.call(plan, lhs, rhs, sizes, scales, out_dtype, name=name)
  return out[:, :width]


@dataclasses.dataclass(frozen=True)
class _Shape:
  """What is multiplied; a matrix is K x N as it is used."""

  rows: int
  k: int
  n: int
  bytes_lhs: int
  bytes_rhs: int
  bytes_out: int
  scaled: bool
  transposed: bool


def _product_plan(tpu, shape, config):
  """The largest plan that fits, or `None` if K and N must be aligned first."""
  depth = config.get('depth', _DEPTH.get(tpu.name, _LANES))
  chunk = min(config.get('chunk', 512), shape.n)
  if shape.n % _LANES:
    chunk = shape.n
  elif tpu.name in _MEGACORE and shape.n % (2 * _LANES) == 0:
    chunk = min(chunk, shape.n // 2)
  wanted = config.get('block_n', shape.n)
  most_rows = config.get('block_rows', _BLOCK_ROWS.get(tpu.name, 512))
  if shape.bytes_lhs > 2:
    most_rows //= 2
  budget = tpu.vmem_bytes - _SPARE_BYTES
  for num_k in _divisors(shape.k // _LANES if shape.k % _LANES == 0 else 1):
    for rows in _halves(most_rows, _LANES):
      plan = _with_columns(
        tpu,
        shape,
        num_k,
        rows,
        depth,
        chunk,
        config.get('part_rows', _PART_ROWS),
      )
      per_chunk = _bytes(plan, shape)
      fixed = _bytes(dataclasses.replace(plan, num_chunks=0), shape)
      fit = (budget - fixed) // (per_chunk - fixed)
      fit = min(fit, -(-wanted // chunk))
      if fit * chunk >= min(_MIN_BLOCK_N, shape.n, max(wanted, chunk)):
        return _with_columns(
          tpu, shape, num_k, rows, depth, chunk, plan.part_rows, fit
        )
  return None


def _with_columns(tpu, shape, num_k, rows, depth, chunk, part_rows, fit=1):
  """A plan of at most `rows` rows and `fit` chunks in VMEM."""
  part_rows = min(part_rows, rows)
  if shape.rows < part_rows:
    part_rows = _round_up(shape.rows, 16)
  rows = min(rows, _round_up(shape.rows, part_rows))
  total = -(-shape.n // chunk)
  num_n = -(-total // fit)
  cores = 1
  if tpu.name in _MEGACORE:
    even = (
      c
      for c in range(_round_up(num_n, 2), total + 1, 2)
      if -(-total // -(-total // c)) == c
    )
    found = next(even, None)
    num_n, cores = (num_n, 1) if found is None else (found, 2)
  num_chunks = -(-total // num_n)
  num_n = -(-total // num_chunks)
  return product.Plan(
    block_rows=rows,
    part_rows=part_rows,
    block_k=shape.k // num_k,
    num_k=num_k,
    depth=depth,
    chunk=chunk,
    num_chunks=num_chunks,
    num_n=num_n,
    cores=cores,
    width=shape.n,
    transposed=shape.transposed,
  )


def _bytes(plan, shape):
  """VMEM of a plan."""
  k, chunk = _round_up(plan.block_k, _LANES), _round_up(plan.chunk, _LANES)
  n = plan.num_chunks * chunk
  matrix = 2 * shape.bytes_rhs + shape.bytes_lhs * shape.scaled
  partials = n if plan.num_k > 1 else chunk
  return (
    2 * plan.block_rows * (k * shape.bytes_lhs + n * shape.bytes_out)
    + k * n * matrix
    + 4 * plan.block_rows * partials
  )


def _gradient_plan(tpu, lhs, rhs, config):
  """The largest plan that fits."""
  _, k, n = rhs.shape
  part_rows = config.get('part_rows', _PART_ROWS)
  if lhs.shape[0] < part_rows:
    part_rows = _round_up(lhs.shape[0], 16)
  rows = config.get('block_rows', 256 if tpu.name == 'v4' else 512)
  rows = min(rows, _round_up(lhs.shape[0], part_rows))
  chunk_k = min(config.get('chunk_k', 256), k)
  block_k = min(config.get('block_k', k), k)
  block_n = min(config.get('block_n', n), n)
  cores = 1
  if tpu.name in _MEGACORE and n >= 2 * _LANES:
    block_n = min(block_n, _round_up(-(-n // 2), _LANES))
  budget = tpu.vmem_bytes - _SPARE_BYTES

  def needed(block_k, block_n):
    block_k, block_n = (_round_up(b, _LANES) for b in (block_k, block_n))
    tiles = 2 * rows * (block_k + block_n) + chunk_k * rows
    tiles = (tiles + part_rows * block_n) * lhs.dtype.itemsize
    return tiles + block_k * block_n * (4 + 2 * rhs.dtype.itemsize)

  while needed(block_k, block_n) > budget:
    if block_n >= block_k and block_n > _LANES:
      block_n = _round_up(block_n // 2, _LANES)
    else:
      block_k = _round_up(block_k // 2, _LANES)
      chunk_k = min(chunk_k, block_k)
  block_k = _round_up(block_k, chunk_k)
  num_n = -(-n // block_n)
  if tpu.name in _MEGACORE and num_n % 2 == 0:
    cores = 2
  return weight_gradient.Plan(
    block_rows=rows,
    part_rows=part_rows,
    block_k=block_k,
    num_k=-(-k // block_k),
    chunk_k=chunk_k,
    block_n=block_n,
    num_n=num_n,
    piece=config.get('piece', 512),
    depth=config.get('depth', _DEPTH.get(tpu.name, _LANES)),
    cores=cores,
  )


def _divisors(number):
  return [d for d in range(1, number + 1) if number % d == 0]


def _halves(most, least):
  """`most`, its half, and so on down to `least`."""
  while most > least:
    yield most
    most //= 2
  yield least


def _round_up(number, multiple):
  return -(-number // multiple) * multiple
