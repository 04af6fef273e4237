"""What a TPU kernel visits: the parts of groups in blocks of rows.

Groups are known only at run time. XLA computes this list before the kernel
starts, as MegaBlocks does (Gale et al., https://arxiv.org/abs/2211.15841,
section 5.1.3); the scalar core reads it. An item is the rows that one group has
in one block, so a block on a boundary belongs to several items, one after the
other.

Cost: about (M / block + E) E comparisons, no sort.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Items:
  """One entry per item in every array, groups in order; int32.

  Attributes:
    group: Its group; E is that of the rows beyond the sum.
    block: Its block of rows.
    first_row: Where it starts in the block.
    end_row: Where it ends; no greater than `first_row` if it has no rows.
    first: First item of its group.
    end: First item of the groups behind its own.
    counts: How many items belong to groups below E, and how many there are.
  """

  group: jax.Array
  block: jax.Array
  first_row: jax.Array
  end_row: jax.Array
  first: jax.Array
  end: jax.Array
  counts: jax.Array

  def arrays(self) -> tuple[jax.Array, ...]:
    """All of them, in order."""
    return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


def make(
  group_sizes: jax.Array, num_rows: int, block: int, *, every_group: bool
) -> Items:
  """Lists the items.

  Args:
    group_sizes: Rows of each group.
    num_rows: Of all groups and of none.
    block: Rows of a block.
    every_group: Gives each empty group an item and the rows beyond the sum
      none, for results that have a part per group; else the other way round,
      for results that have a row per row.
  """
  num_groups = group_sizes.shape[0]
  sizes = group_sizes.astype(jnp.int32)
  if not every_group:
    sizes = jnp.append(sizes, jnp.maximum(num_rows - jnp.sum(sizes), 0))
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  num_blocks = -(-ends // block) - starts // block
  num_blocks = jnp.where(sizes > 0, num_blocks, int(every_group))
  item_ends = jnp.cumsum(num_blocks)
  item_starts = item_ends - num_blocks
  bound = -(-num_rows // block) + 2 * num_groups
  index = jnp.arange(bound, dtype=jnp.int32)
  group = jnp.sum(item_ends <= index[:, None], axis=1, dtype=jnp.int32)
  group = jnp.minimum(group, sizes.shape[0] - 1)
  row_block = starts[group] // block + index - item_starts[group]
  # Empty groups behind the last row have a block too.
  row_block = jnp.minimum(row_block, -(-num_rows // block) - 1)
  return Items(
    group=group,
    block=row_block,
    first_row=jnp.maximum(starts[group] - row_block * block, 0),
    end_row=jnp.minimum(ends[group] - row_block * block, block),
    first=item_starts[group],
    end=item_ends[group],
    counts=jnp.stack([item_ends[num_groups - 1], item_ends[-1]]),
  )
