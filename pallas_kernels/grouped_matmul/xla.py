"""grouped_matmul as a loop over blocks of rows, each inside one group.

A group of g rows is ceil(g / block) blocks; only blocks that exist are visited,
so skewed groups cost what their rows cost. The last block of a group reads and
writes past the group's end: the rows it spoils belong to later groups, whose
blocks come later and overwrite them.

Cost: 2 M K N FLOPs plus at most E block-sized paddings; reads one [K, N] matrix
per block. The VJP is two such loops.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import varying
from pallas_kernels.common.gradient import with_gradient

_MIN_BLOCK, _MAX_BLOCK = 4, 128


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None = None,
  **static: DTypeLike | None,
) -> jax.Array:
  """See `api.grouped_matmul`."""

  def forward(*args):
    return grouped_matmul_forward(*args, **static), args

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
) -> jax.Array:
  """The result, without a derivative; all arguments vary alike."""
  out_dtype = jnp.dtype(preferred_element_type or lhs.dtype)
  return _forward(lhs, rhs, group_sizes, rhs_scales, out_dtype, 0)


def grouped_matmul_backward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  rhs_scales: jax.Array | None,
  d_out: jax.Array,
  *,
  preferred_element_type: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Gradients of `lhs` and of `rhs`; the latter is `None` if it has scales."""
  del preferred_element_type
  d_lhs = _forward(d_out, rhs, group_sizes, rhs_scales, lhs.dtype, 1)
  if rhs_scales is not None:
    return d_lhs, None
  return d_lhs, _backward_rhs(lhs, d_out, rhs, group_sizes)


def _forward(lhs, rhs, group_sizes, rhs_scales, out_dtype, rhs_contracts):
  """`lhs @ rhs[e]`, or `lhs @ rhs[e].T` if `rhs_contracts` is 1."""
  num_rows, width = lhs.shape
  out_width = rhs.shape[2 - rhs_contracts]
  if 0 in lhs.shape or 0 in rhs.shape:
    return varying.zeros((num_rows, out_width), out_dtype, lhs)
  group, start, _, num_blocks, block = _blocks(group_sizes, num_rows)
  padded = jnp.pad(lhs, ((0, block), (0, 0)))

  def body(i, out):
    rows = jax.lax.dynamic_slice(padded, (start[i], 0), (block, width))
    matrix = jax.lax.dynamic_index_in_dim(rhs, group[i], keepdims=False)
    if rhs_scales is None:
      product = _dot(rows, matrix, 1, rhs_contracts)
    else:
      # Eight-bit values are exact in every wider type.
      matrix = matrix.astype(rows.dtype)
      scale = rhs_scales[group[i]].astype(jnp.float32)
      if rhs_contracts:
        rows = (rows * scale).astype(rows.dtype)
      product = _dot(rows, matrix, 1, rhs_contracts)
      if not rhs_contracts:
        product *= scale
    return jax.lax.dynamic_update_slice(
      out, product.astype(out_dtype), (start[i], 0)
    )

  shape = (num_rows + block, out_width)
  out = jax.lax.fori_loop(
    0, num_blocks, body, varying.zeros(shape, out_dtype, lhs)
  )
  used = jnp.arange(num_rows) < jnp.sum(group_sizes)
  return jnp.where(used[:, None], out[:num_rows], 0)


def _backward_rhs(lhs, d_out, rhs, group_sizes):
  num_rows = lhs.shape[0]
  if 0 in lhs.shape or 0 in rhs.shape:
    return varying.zeros(rhs.shape, rhs.dtype, lhs)
  group, start, end, num_blocks, block = _blocks(group_sizes, num_rows)
  lhs, d_out = (jnp.pad(a, ((0, block), (0, 0))) for a in (lhs, d_out))

  def body(i, d_rhs):
    rows, d_rows = (
      jax.lax.dynamic_slice(a, (start[i], 0), (block, a.shape[1]))
      for a in (lhs, d_out)
    )
    inside = start[i] + jnp.arange(block) < end[i]
    rows = jnp.where(inside[:, None], rows, 0)
    d_rows = jnp.where(inside[:, None], d_rows, 0)
    old = jax.lax.dynamic_index_in_dim(d_rhs, group[i], keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(
      d_rhs, old + _dot(rows, d_rows, 0, 0), group[i], 0
    )

  zeros = varying.zeros(rhs.shape, jnp.float32, lhs)
  d_rhs = jax.lax.fori_loop(0, num_blocks, body, zeros)
  return d_rhs.astype(rhs.dtype)


def _dot(a, b, a_contracts, b_contracts):
  dtype = jnp.promote_types(a.dtype, b.dtype)
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((a_contracts,), (b_contracts,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _blocks(group_sizes, num_rows):
  """Group, first row and end of group of every block, how many, and rows each.

  The arrays have the static bound on the number of blocks as their length.
  """
  num_groups = group_sizes.shape[0]
  mean = num_rows / num_groups
  block = 2 ** math.ceil(math.log2(max(mean, 1)))
  block = min(max(block, _MIN_BLOCK), _MAX_BLOCK)
  bound = num_rows // block + min(num_groups, num_rows)
  blocks = -(-group_sizes // block)
  last = jnp.cumsum(blocks)
  index = jnp.arange(bound)
  group = jnp.searchsorted(last, index, side='right')
  group = jnp.minimum(group, num_groups - 1)
  end = jnp.cumsum(group_sizes)[group]
  within = index - (last - blocks)[group]
  start = end - group_sizes[group] + within * block
  return group, start, end, last[-1], block
