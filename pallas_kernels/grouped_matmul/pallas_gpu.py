"""grouped_matmul for Hopper: persistent tiles of groups, by TMA and WGMMA.

Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts",
https://arxiv.org/abs/2211.15841, section 5. The result and the gradient of the
rows are `pallas_gpu_product`, which reads matrices as they are or transposed,
without a copy; the gradient of the matrices is `pallas_gpu_weight_gradient`.

Deviations: tiles start at the eight rows where a group does, not at multiples
of a tile, so that a group has at most one tile more than its rows fill. The
cotangent is rounded to bfloat16, as the rows are.

*Cost*: 2 M K N FLOPs, and again for each gradient; each group adds at most a
tile of rows, or 64 rows in the gradient of the matrices. HBM: the matrices of
groups that have rows, about once per `across` tiles of rows, which the second
level of cache keeps; lhs likewise once per wave of tiles. Rows that are no
multiple of 8 and widths that are none of 64 are padded, which copies what has
them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper
from pallas_kernels.common import hopper_matmul
from pallas_kernels.common import tuned
from pallas_kernels.common import varying
from pallas_kernels.common.gradient import with_gradient
from pallas_kernels.grouped_matmul import pallas_gpu_product as product
from pallas_kernels.grouped_matmul import (
  pallas_gpu_weight_gradient as weight_gradient,
)

_DEPTH = 64
_MAX_SLOTS = 6
_MAX_ACROSS = 8
# Blocks of a cluster.
_PEERS = 2
_BLOCK_N = (256, 128)


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
    rhs_scales: See there; must be `None`.
    preferred_element_type: See there.
    config: At most, of `pallas_gpu_product.Plan`: 'block_rows', 'block_n',
      'slots', at most, 'across' and 'peers'; `None` is what is tuned.

  Returns:
    See there.

  Raises:
    NotImplementedError: Dtypes that the kernel does not take.
  """
  out_dtype = jnp.dtype(preferred_element_type or lhs.dtype)
  _check(lhs, rhs, out_dtype)
  return _multiply(lhs, rhs, group_sizes, out_dtype, False, config)


def grouped_matmul_backward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None,
  d_out: jax.Array,
  *,
  preferred_element_type: DTypeLike | None = None,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of `lhs` and of `rhs`.

  Args:
    lhs: See `api.grouped_matmul`, as for the next three.
    rhs: See there.
    group_sizes: See there.
    rhs_scales: See there; must be `None`.
    d_out: Cotangent of the result.
    preferred_element_type: See there.
    config: For the gradient of `rhs`; at most, of
      `pallas_gpu_weight_gradient.Plan`: 'block_n', 'slots', at most,
      'across' and 'peers'; `None` is what is tuned.

  Returns:
    Arrays as `lhs` and as `rhs`.

  Raises:
    NotImplementedError: Dtypes that the kernels do not take.
  """
  _check(lhs, rhs, jnp.dtype(preferred_element_type or lhs.dtype))
  d_out = d_out.astype(lhs.dtype)
  d_lhs = _multiply(d_out, rhs, group_sizes, lhs.dtype, True, None)
  if 0 in lhs.shape or 0 in rhs.shape:
    return d_lhs, varying.zeros(rhs.shape, rhs.dtype, lhs)
  gpu = hopper.current()
  if config is None:
    config = tuned.lookup(
      'grouped_matmul',
      gpu.name,
      backward_features(lhs, rhs),
      function='grouped_matmul_backward',
    )
  plan = _gradient_plan(gpu, rhs, config)
  d_rhs = weight_gradient.call(
    plan,
    _pad(lhs, product.ALIGNMENT, _DEPTH),
    _pad(d_out, product.ALIGNMENT, _DEPTH),
    group_sizes,
    rhs.dtype,
  )
  return d_lhs, d_rhs[:, : rhs.shape[1], : rhs.shape[2]]


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
  del chip_name, static
  lhs, rhs = args[:2]
  few = lhs.shape[0] <= hopper.ROWS * rhs.shape[0]
  return [
    dict(block_rows=rows, block_n=n, slots=slots, across=across, peers=peers)
    for rows in ((64,) if few else (64, 128))
    for n in _BLOCK_N
    for slots in (4, _MAX_SLOTS)
    for peers in ((1,) if few else (1, 2))
    for across in ((1,) if few else (2, 4, 8, 16))
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
  del chip_name, args, static
  return [
    dict(block_n=n, slots=slots, across=across, peers=peers)
    for n in _BLOCK_N
    for slots in (4, _MAX_SLOTS)
    for peers in (1, 2)
    for across in (2, 4, 8)
  ]


def _check(lhs, rhs, out_dtype):
  if lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f'rows of {lhs.dtype}, matrices of {rhs.dtype}: the kernels multiply '
      'bfloat16 only'
    )
  if out_dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'a result of {out_dtype}')


def _multiply(lhs, rhs, sizes, out_dtype, transposed, config):
  """Rows times matrices, or times transposed ones."""
  num_rows, width = lhs.shape[0], rhs.shape[1 if transposed else 2]
  if 0 in lhs.shape or 0 in rhs.shape:
    return varying.zeros((num_rows, width), out_dtype, lhs)
  gpu = hopper.current()
  if config is None:
    described = features(lhs, rhs, transposed=transposed)
    config = tuned.lookup('grouped_matmul', gpu.name, described)
  plan = _product_plan(gpu, lhs, rhs, width, transposed, config)
  lhs = _pad(lhs, product.ALIGNMENT, _DEPTH)
  out = product.call(plan, lhs, _pad(rhs, _DEPTH, _DEPTH), sizes, out_dtype)
  return out[:num_rows, :width]


def _product_plan(gpu, lhs, rhs, width, transposed, config):
  num_rows, num_groups = lhs.shape[0], rhs.shape[0]
  few = num_rows <= hopper.ROWS * num_groups
  rows = config.get('block_rows', (1 if few else 2) * hopper.ROWS)
  per_group = -(-num_rows // (num_groups * rows))
  tiles = min(num_groups, num_rows) * per_group

  def waves(block_n):
    """Columns that the busiest block computes."""
    return -(-tiles * -(-width // block_n) // gpu.num_sms) * block_n

  block_n = config.get('block_n', min(_BLOCK_N, key=waves))
  peers = config.get('peers', _PEERS if per_group > 1 else 1)
  across = min(-(-per_group // peers) * peers, _MAX_ACROSS)
  stage = product.CONSUMERS * hopper.ROWS * hopper_matmul.SWIZZLE
  return product.Plan(
    block_rows=rows,
    block_n=block_n,
    depth=_DEPTH,
    slots=hopper_matmul.slots_that_fit(
      lhs.dtype.itemsize * (rows + block_n) * _DEPTH,
      2 * stage,
      config.get('slots', _MAX_SLOTS),
    ),
    across=config.get('across', across),
    peers=peers,
    blocks=gpu.num_sms,
    transposed=transposed,
  )


def _gradient_plan(gpu, rhs, config):
  num_groups, k, n = rhs.shape
  block_k = product.CONSUMERS * hopper.ROWS
  tiles = num_groups * -(-k // block_k)

  def waves(block_n):
    return -(-tiles * -(-n // block_n) // gpu.num_sms) * block_n

  block_n = config.get('block_n', min(_BLOCK_N, key=waves))
  return weight_gradient.Plan(
    block_n=block_n,
    depth=_DEPTH,
    slots=hopper_matmul.slots_that_fit(
      rhs.dtype.itemsize * (block_k + block_n) * _DEPTH,
      block_k * hopper_matmul.SWIZZLE,
      config.get('slots', _MAX_SLOTS),
    ),
    across=config.get('across', _MAX_ACROSS),
    peers=config.get('peers', _PEERS if k > block_k else 1),
    blocks=gpu.num_sms,
  )


def _pad(array, row_multiple, column_multiple):
  """Pads the last dimensions with zeros to multiples."""
  rows = -array.shape[-2] % row_multiple
  columns = -array.shape[-1] % column_multiple
  if not rows and not columns:
    return array
  before = [(0, 0)] * (array.ndim - 2)
  return jnp.pad(array, [*before, (0, rows), (0, columns)])
