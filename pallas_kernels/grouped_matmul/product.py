"""The kernel of grouped_matmul for TPUs, its matrices read once or transposed.

A grid step is one item of `work_items`: the rows of one group in one block. The
group's matrix, or the columns of it that fit, stays in VMEM for all items of
the group, while the next group's is copied in behind it in chunks; so a wait
is at most for the first chunk, and where VMEM holds whole matrices everything
is read and written just once. Blocks inside a group are one product per chunk;
blocks that straddle a boundary go by 128 rows and leave the other rows alone.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip
from pallas_kernels.common import varying
from pallas_kernels.grouped_matmul import work_items

_WIDEN_ROWS, _MIN_WIDEN_ROWS, _WIDEN_COLUMNS = 64, 32, 512
_LANES = 128
# Rows that are merged together.
_MERGED_ROWS = 16
# Rows of matrices in one body of a loop.
_MAX_INNER_K = 2048
_MAX_PIECE = 512
_ITEM_ARRAYS = len(dataclasses.fields(work_items.Items))


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of one call; a matrix has K rows and N columns as it is used.

  Attributes:
    block_rows: Rows of a block.
    part_rows: Rows that are computed together on a boundary.
    block_k: Rows of a matrix that are in VMEM together.
    num_k: Blocks of K.
    depth: Rows of a matrix whose products the compiler is given to add up.
    chunk: Columns of one copy and one product.
    num_chunks: Chunks in VMEM together, which are a block of N.
    num_n: Blocks of N.
    cores: That share the blocks of N.
    width: N.
    transposed: Whether matrices are stored as [N, K].
  """

  block_rows: int
  part_rows: int
  block_k: int
  num_k: int
  depth: int
  chunk: int
  num_chunks: int
  num_n: int
  cores: int
  width: int
  transposed: bool

  @property
  def tail(self) -> int:
    """Columns of the last chunk where it is narrower, else 0."""
    return self.width % self.chunk

  @property
  def piece(self) -> int:
    """Columns of one product."""
    return self.chunk if self.num_chunks > 1 else min(self.chunk, _MAX_PIECE)

  @property
  def num_partials(self) -> int:
    """Chunks of results that are kept in float32 while they add up."""
    if self.num_k > 1:
      return self.num_chunks
    return int(self.depth < self.block_k or self.inner_k < self.block_k)

  @property
  def inner_k(self) -> int:
    """Rows of a matrix that one body of code multiplies by."""
    if self.block_k % 128:
      return self.block_k
    tiles = self.block_k // 128
    most = max(
      d
      for d in range(1, tiles + 1)
      if tiles % d == 0 and d * 128 <= max(_MAX_INNER_K, 128)
    )
    return most * 128

  @property
  def partial_shape(self) -> tuple[int, int, int]:
    """Shape of those; at least a part of a block."""
    rows = self.block_rows if self.num_partials else self.part_rows
    return max(self.num_partials, 1), rows, self.chunk

  @property
  def chunk_shape(self) -> tuple[int, int]:
    """Shape of a chunk as stored."""
    shape = (self.block_k, self.chunk)
    return shape[::-1] if self.transposed else shape


def call(
  plan: Plan,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  scales: jax.Array | None,
  out_dtype: jnp.dtype,
  *,
  name: str,
) -> jax.Array:
  """Products of the rows of `lhs` with their group's matrix.

  Args:
    plan: Sizes.
    lhs: `[M, K]`.
    rhs: `[E, K, N]`, or `[E, N, K]` if transposed.
    group_sizes: `[E]`.
    scales: Of the columns of the matrices as stored, `[E, 1, columns]`, or
      `None`.
    out_dtype: Of the result.
    name: Of the kernel.

  Returns:
    `[M, N]`; rows beyond the groups are 0.
  """
  num_rows = lhs.shape[0]
  num_groups = rhs.shape[0]
  items = work_items.make(
    group_sizes, num_rows, plan.block_rows, every_group=False
  )
  block_n = plan.num_chunks * plan.chunk
  n_per_core = plan.num_n // plan.cores

  def lhs_index(core, n, i, k, group, block, *_):
    return block[i], k

  def out_index(core, n, i, k, group, block, *_):
    return block[i], core * n_per_core + n

  def scale_index(core, n, i, k, group, *_):
    column = k if plan.transposed else core * n_per_core + n
    return jnp.minimum(group[i], num_groups - 1), 0, column

  in_specs = [
    pl.BlockSpec((plan.block_rows, plan.block_k), lhs_index),
    pl.BlockSpec(memory_space=pl.ANY),
  ]
  scratch = [
    pltpu.VMEM((2, plan.num_chunks, *plan.chunk_shape), rhs.dtype),
    pltpu.SemaphoreType.DMA((2, plan.num_chunks)),
    pltpu.SMEM((1,), jnp.int32),
  ]
  if scales is not None:
    scale_width = plan.block_k if plan.transposed else block_n
    in_specs.append(pl.BlockSpec((None, 1, scale_width), scale_index))
    scratch.append(pltpu.VMEM((plan.num_chunks, *plan.chunk_shape), lhs.dtype))
  scratch.append(pltpu.VMEM(plan.partial_shape, jnp.float32))
  return pl.pallas_call(
    functools.partial(_product_kernel, plan=plan, scaled=scales is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=_ITEM_ARRAYS,
      grid=(plan.cores, n_per_core, items.counts[1], plan.num_k),
      in_specs=in_specs,
      out_specs=pl.BlockSpec((plan.block_rows, block_n), out_index),
      scratch_shapes=scratch,
    ),
    out_shape=varying.shape((num_rows, plan.width), out_dtype, lhs),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', *('arbitrary',) * 3),
      vmem_limit_bytes=chip.current().vmem_bytes,
    ),
    name=name,
  )(*items.arrays(), lhs, rhs, *(() if scales is None else (scales,)))


def _product_kernel(*refs, plan, scaled):
  """One item: `refs` are those of the items, then as in `call`."""
  group, _, first_row, end_row, first, end, counts = refs[:_ITEM_ARRAYS]
  lhs_ref, rhs_hbm, *rest = refs[_ITEM_ARRAYS:]
  scale_ref = rest.pop(0) if scaled else None
  out_ref, buffer, semaphores, loads, *rest = rest
  wide = rest.pop(0) if scaled else None
  partials = rest.pop(0)
  core, n, i, k = (pl.program_id(axis) for axis in range(4))
  n_per_core = plan.num_n // plan.cores
  n_here = core * n_per_core + n
  is_start = (n == 0) & (i == 0) & (k == 0)
  in_group = i < counts[0]
  is_load = in_group & ((i == first[i]) | (plan.num_k > 1))

  # What is copied after this item's matrix: more of it, or the next group's.
  more_k = k + 1 < plan.num_k
  after = jnp.where(plan.num_k > 1, i + 1, end[i])
  more_items = after < counts[0]
  next_i = jnp.where(more_k, i, jnp.where(more_items, after, 0))
  next_k = jnp.where(more_k, k + 1, 0)
  next_n = jnp.where(more_k | more_items, n_here, n_here + 1)
  has_next = more_k | more_items | (n + 1 < n_per_core)

  def copy(slot, c, n_block, item, k_block, width=plan.chunk):
    ks = ns = slice(None)  # Which need not be aligned.
    if plan.num_k > 1:
      ks = _aligned(k_block, plan.block_k)
    if plan.chunk < plan.width:
      ns = _aligned(n_block * plan.num_chunks + c, plan.chunk, width)
    source = (ns, ks) if plan.transposed else (ks, ns)
    to = buffer.at[slot, c]
    if width != plan.chunk:
      to = to.at[*_columns(plan, width)]
    return pltpu.make_async_copy(
      rhs_hbm.at[group[item], *source], to, semaphores.at[slot, c]
    )

  num_full = plan.width // plan.chunk

  def start_copy(slot, c, n_block, item, k_block):
    index = n_block * plan.num_chunks + c

    @pl.when(index < num_full)
    def _():
      copy(slot, c, n_block, item, k_block).start()

    if plan.tail:

      @pl.when(index == num_full)
      def _():
        copy(slot, c, n_block, item, k_block, plan.tail).start()

  @pl.when(is_start)
  def _():
    loads[0] = -1

    @pl.when(in_group)
    def _():
      @pl.loop(0, plan.num_chunks)
      def _(c):
        start_copy(0, c, n_here, i, k)

  @pl.when(is_load)
  def _():
    loads[0] += 1

  slot = loads[0] % 2
  low, high = first_row[i], end_row[i]
  is_whole = (low == 0) & (high == plan.block_rows)
  parts = low // plan.part_rows, pl.cdiv(high, plan.part_rows)

  def multiply(c, width):
    """Multiplies by the first `width` columns of chunk c."""
    partial = partials.at[c % partials.shape[0]]
    matrix = wide.at[c] if scaled else buffer.at[slot, c]

    def store(rows, num_rows, first_row=None):
      kept = partial.at[rows if plan.num_partials else pl.ds(0, num_rows)]
      for left in range(0, width, plan.piece):
        piece = pl.ds(left, min(plan.piece, width - left))
        columns = piece
        if plan.num_chunks > 1:
          start = pl.multiple_of(c * plan.chunk, plan.chunk)
          columns = pl.ds(pl.multiple_of(start + left, _LANES), piece.size)
        product = _accumulate(plan, lhs_ref.at[rows], matrix, piece, kept, k)
        if scaled and not plan.transposed:
          product *= scale_ref[:, columns]
        if first_row is None:
          out_ref[rows, columns] = product.astype(out_ref.dtype)
        else:
          old = out_ref[rows, columns].astype(jnp.float32)
          inside = _inside(low, high, first_row, num_rows)
          new = jnp.where(inside, product, old)
          out_ref[rows, columns] = new.astype(out_ref.dtype)

    def in_parts(masked):
      @pl.loop(*parts)
      def _(part):
        first = part * plan.part_rows
        rows = _aligned(part, plan.part_rows)
        store(rows, plan.part_rows, first if masked else None)

    @pl.when(in_group & is_whole)
    def _():
      if lhs_ref.dtype == jnp.float32:
        in_parts(masked=False)  # Its many passes need the registers.
      else:
        rows = pl.ds(0, plan.block_rows)
        store(rows, plan.block_rows)

    @pl.when(in_group & ~is_whole)
    def _():
      in_parts(masked=True)

  def chunk_step(c, width):
    @pl.when(is_load)
    def _():
      copy(slot, c, n_here, i, k, width).wait()
      if scaled:
        _widen(
          buffer.at[slot, c], wide.at[c], scale_ref if plan.transposed else None
        )

      @pl.when(has_next)
      def _():
        start_copy(1 - slot, c, next_n, next_i, next_k)

    multiply(c, width)

  @pl.when(in_group)
  def _():
    first_chunk = n_here * plan.num_chunks

    @pl.loop(0, jnp.minimum(num_full - first_chunk, plan.num_chunks))
    def _(c):
      chunk_step(c, plan.chunk)

    if plan.tail:

      @pl.when(num_full - first_chunk < plan.num_chunks)
      def _():
        chunk_step(num_full - first_chunk, plan.tail)

  @pl.when(~in_group)
  def _():
    _clear(plan, out_ref, low, high)


def _accumulate(plan, lhs_ref, matrix, piece, kept, k):
  """Sums over this block of K; what is not the end result stays in `kept`."""

  def add(k_first, is_first):
    """Adds `inner_k` rows of the matrix from `k_first` on."""
    for start in range(0, plan.inner_k, plan.depth):
      ks = pl.ds(k_first + start, min(plan.depth, plan.inner_k - start))
      part = matrix[piece, ks] if plan.transposed else matrix[ks, piece]
      product = _dot(lhs_ref[:, ks], part, plan.transposed)
      if start:
        product += kept[:, piece]
      elif is_first is not None:
        product += jnp.where(is_first, 0.0, kept[:, piece])
      if is_first is not None or start + plan.depth < plan.inner_k:
        kept[:, piece] = product
    return product

  steps = plan.block_k // plan.inner_k
  if steps == 1:
    return add(0, None if plan.num_k == 1 else k == 0)

  @pl.loop(0, steps - 1)
  def _(j):
    first = pl.multiple_of(j * plan.inner_k, plan.inner_k)
    add(first, (k == 0) & (j == 0))

  return add((steps - 1) * plan.inner_k, False)


def _inside(low, high, first, num_rows):
  """Which of some rows of the block belong to the item."""
  row = jax.lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) + first
  return (row >= low) & (row < high)


def _clear(plan, out_ref, low, high):
  """Makes the item's rows zeros, a few at a time."""
  size = math.gcd(plan.block_rows, _MERGED_ROWS)

  @pl.loop(low // size, pl.cdiv(high, size))
  def _(j):
    old = out_ref[_aligned(j, size), :]
    inside = _inside(low, high, j * size, size)
    out_ref[_aligned(j, size), :] = _where(inside, jnp.zeros_like(old), old)


def _where(mask, new, old):
  """Of any dtype; older chips have no masks of 16-bit values."""
  wide = jnp.where(mask, new.astype(jnp.float32), old.astype(jnp.float32))
  return wide.astype(new.dtype)


def _widen(narrow, wide, scale_ref):
  """Converts a few rows at a time, which registers can hold."""
  rows = math.gcd(narrow.shape[0], _WIDEN_ROWS)
  if rows < _MIN_WIDEN_ROWS:
    rows = narrow.shape[0]

  @pl.loop(0, narrow.shape[0] // rows)
  def _(i):
    for left in range(0, narrow.shape[1], _WIDEN_COLUMNS):
      columns = pl.ds(left, min(_WIDEN_COLUMNS, narrow.shape[1] - left))
      at = _aligned(i, rows), columns
      values = narrow[*at].astype(jnp.float32)
      if scale_ref is not None:
        values *= scale_ref[:, columns]
      wide[*at] = values.astype(wide.dtype)


def _columns(plan, width):
  first, every = pl.ds(0, width), slice(None)
  return (first, every) if plan.transposed else (every, first)


def _aligned(index, size, length=None):
  return pl.ds(pl.multiple_of(index * size, size), length or size)


def _dot(a, b, transposed):
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (int(transposed),)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
  )
