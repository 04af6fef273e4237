"""Public entry point of grouped_matmul."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import dispatch


def grouped_matmul(
  lhs: Float[Array, 'M K'],
  rhs: Float[Array, 'E K N'],
  group_sizes: Int[Array, 'E'],
  *,
  preferred_element_type: DTypeLike | None = None,
  implementation: str | None = None,
) -> Float[Array, 'M N']:
  """Multiplies each group of consecutive rows by its own matrix.

  Group e is the `group_sizes[e]` rows after those of the groups before it, and
  its result is `rows @ rhs[e]`. No row is dropped and none is padded by the
  caller, however uneven the groups (Gale et al., MegaBlocks,
  https://arxiv.org/abs/2211.15841, section 4). Accumulates in float32.

  With `rhs` sharded over experts, call it inside `jax.shard_map` on the local
  experts: a group is found by a dynamic index, which the automatic partitioner
  can only answer by gathering the experts.

  Args:
    lhs: Rows, sorted by group.
    rhs: One matrix per group.
    group_sizes: Rows of each group; may be 0. Rows beyond their sum come out
      as zeros; a sum above M is the caller's mistake and is not detected.
    preferred_element_type: Dtype of the result; `None` is that of `lhs`.
    implementation: One of 'reference', 'xla'; `None` is the fastest.

  Returns:
    The products, rows in the order of `lhs`.

  Raises:
    ValueError: Shapes that do not fit together, or `group_sizes` that are not
      integers.
  """
  if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
    raise ValueError(
      f'grouped_matmul takes lhs [M, K], rhs [E, K, N] and group_sizes [E], '
      f'not {lhs.shape}, {rhs.shape} and {group_sizes.shape}'
    )
  if lhs.shape[1] != rhs.shape[1] or rhs.shape[0] != group_sizes.shape[0]:
    raise ValueError(
      f'lhs {lhs.shape}, rhs {rhs.shape} and group_sizes {group_sizes.shape} '
      'disagree on K or on E'
    )
  if group_sizes.dtype.kind not in 'iu':
    raise ValueError(f'group_sizes are {group_sizes.dtype}, not integers')
  return dispatch(
    'grouped_matmul',
    lhs,
    rhs,
    group_sizes,
    preferred_element_type=preferred_element_type,
    implementation=implementation,
  )
