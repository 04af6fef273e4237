"""The kernel of grouped_matmul's gradient with respect to its matrices.

A matrix's gradient is the product of its group's rows of `lhs`, transposed,
and of the result's cotangent: a sum over the items of `work_items` that stays
in VMEM until the group ends. Rows are transposed a few columns at a time, once
per block. Blocks that straddle a boundary go part by part, foreign rows
replaced by zeros on both sides, since they may hold anything.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip
from pallas_kernels.common import varying
from pallas_kernels.grouped_matmul import work_items

_ITEM_ARRAYS = len(dataclasses.fields(work_items.Items))


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one call.

  Attributes:
    block_rows: Rows of a block.
    part_rows: Rows that are computed together on a boundary.
    block_k: Columns of `lhs` in VMEM together.
    num_k: Blocks of them.
    chunk_k: Columns that are transposed together.
    block_n: Columns of the cotangent in VMEM together.
    num_n: Blocks of them.
    piece: Columns of one product.
    depth: Rows whose products the compiler is given to add up.
    cores: That share the blocks of columns of the cotangent.
  """

  block_rows: int
  part_rows: int
  block_k: int
  num_k: int
  chunk_k: int
  block_n: int
  num_n: int
  piece: int
  depth: int
  cores: int


def call(
  plan: Plan,
  lhs: jax.Array,
  d_out: jax.Array,
  group_sizes: jax.Array,
  out_dtype: jnp.dtype,
) -> jax.Array:
  """Sums of outer products of the rows of each group.

  Args:
    plan: Sizes.
    lhs: `[M, K]`.
    d_out: `[M, N]`.
    group_sizes: `[E]`.
    out_dtype: Of the result.

  Returns:
    `[E, K, N]`; zeros for groups without rows.
  """
  num_rows, k = lhs.shape
  n = d_out.shape[1]
  items = work_items.make(
    group_sizes, num_rows, plan.block_rows, every_group=True
  )
  n_per_core = plan.num_n // plan.cores

  def lhs_index(core, n, k, i, group, block, *_):
    return block[i], k

  def d_out_index(core, n, k, i, group, block, *_):
    return block[i], core * n_per_core + n

  def out_index(core, n, k, i, group, *_):
    return group[i], k, core * n_per_core + n

  most_rows = max(plan.block_rows, plan.part_rows)
  return pl.pallas_call(
    functools.partial(_weight_gradient_kernel, plan=plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=_ITEM_ARRAYS,
      grid=(plan.cores, n_per_core, plan.num_k, items.counts[1]),
      in_specs=[
        pl.BlockSpec((plan.block_rows, plan.block_k), lhs_index),
        pl.BlockSpec((plan.block_rows, plan.block_n), d_out_index),
      ],
      out_specs=pl.BlockSpec((None, plan.block_k, plan.block_n), out_index),
      scratch_shapes=[
        pltpu.VMEM((plan.block_k, plan.block_n), jnp.float32),
        pltpu.VMEM((plan.chunk_k, most_rows), lhs.dtype),
        pltpu.VMEM((plan.part_rows, plan.block_n), d_out.dtype),
      ],
    ),
    out_shape=varying.shape((group_sizes.shape[0], k, n), out_dtype, lhs),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', *('arbitrary',) * 3),
      vmem_limit_bytes=chip.current().vmem_bytes,
    ),
    name='grouped_matmul_d_rhs',
  )(*items.arrays(), lhs, d_out)


def _weight_gradient_kernel(*refs, plan):
  """One item: `refs` are those of the items, then as in `call`."""
  _, _, first_row, end_row, first, _, _ = refs[:_ITEM_ARRAYS]
  lhs_ref, d_out_ref, out_ref, sums, turned, masked = refs[_ITEM_ARRAYS:]
  i = pl.program_id(3)
  low, high = first_row[i], end_row[i]
  is_first = i == first[i]
  is_whole = (low == 0) & (high == plan.block_rows)

  def accumulate(rows, num_rows, cotangent, is_new, mask=None):
    """Adds the product of `rows` of lhs, transposed, and the cotangent."""

    @pl.loop(0, plan.block_k // plan.chunk_k)
    def _(c):
      ks = pl.ds(pl.multiple_of(c * plan.chunk_k, plan.chunk_k), plan.chunk_k)
      if plan.chunk_k == plan.block_k:
        ks = slice(None)
      values = lhs_ref[rows, ks]
      if mask is not None:
        values = jnp.where(mask, values.astype(jnp.float32), 0.0)
        values = values.astype(lhs_ref.dtype)
      turned[:, pl.ds(0, num_rows)] = values.T
      for left in range(0, plan.block_n, plan.piece):
        ns = pl.ds(left, min(plan.piece, plan.block_n - left))
        for top in range(0, num_rows, plan.depth):
          deep = pl.ds(top, min(plan.depth, num_rows - top))
          total = _dot(turned[:, deep], cotangent[deep, ns])
          old = sums[ks, ns]
          total += jnp.where(is_new, 0.0, old) if top == 0 else old
          sums[ks, ns] = total
        out_ref[ks, ns] = total.astype(out_ref.dtype)

  @pl.when(is_whole)
  def _():
    accumulate(slice(None), plan.block_rows, d_out_ref, is_first)

  @pl.when((low < high) & ~is_whole)
  def _():
    first_part = low // plan.part_rows

    @pl.loop(first_part, pl.cdiv(high, plan.part_rows))
    def _(part):
      rows = pl.ds(
        pl.multiple_of(part * plan.part_rows, plan.part_rows), plan.part_rows
      )
      row = jax.lax.broadcasted_iota(jnp.int32, (plan.part_rows, 1), 0)
      row += part * plan.part_rows
      mask = (row >= low) & (row < high)
      kept = jnp.where(mask, d_out_ref[rows, :].astype(jnp.float32), 0.0)
      masked[...] = kept.astype(masked.dtype)
      is_new = is_first & (part == first_part)
      accumulate(rows, plan.part_rows, masked, is_new, mask)

  @pl.when(low >= high)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)


def _dot(a, b):
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
  )
