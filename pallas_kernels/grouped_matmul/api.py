"""Public entry point of grouped_matmul."""

import functools

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.common import varying
from pallas_kernels.common.dispatch import dispatch
from pallas_kernels.common.gradient import with_gradient

# Of quantised matrices.
_NARROW = ('int8', 'float8_e4m3fn', 'float8_e5m2')


def grouped_matmul(
  lhs: Float[Array, 'M K'],
  rhs: Num[Array, 'E K N'],
  group_sizes: Int[Array, 'E'],
  rhs_scales: Float[Array, 'E N'] | None = None,
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
    rhs: One matrix per group; int8 or float8 if it has scales.
    group_sizes: Rows of each group; may be 0. Rows beyond their sum come out
      as zeros; a sum above M is the caller's mistake and is not detected.
    rhs_scales: What the columns of quantised matrices are multiplied by. Such
      matrices and their scales are constants: their gradients are zeros.
    preferred_element_type: Dtype of the result; `None` is that of `lhs`.
    implementation: 'reference', 'xla', 'pallas_tpu' or 'pallas_gpu'; `None` is
      the fastest that accepts these inputs where the program will run.

  Returns:
    The products, rows in the order of `lhs`.

  Raises:
    ValueError: Shapes that do not fit together, `group_sizes` that are not
      integers, quantised matrices without scales or others with them.
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
  if (rhs_scales is not None) != (rhs.dtype.name in _NARROW):
    raise ValueError(
      f'matrices of {rhs.dtype} with rhs_scales='
      f'{None if rhs_scales is None else rhs_scales.shape}: those of '
      f'{", ".join(_NARROW)} have scales, and only they'
    )
  if rhs_scales is not None and rhs_scales.shape != rhs.shape[::2]:
    raise ValueError(
      f'rhs_scales {rhs_scales.shape} must be [E, N] = {rhs.shape[::2]}'
    )
  call = functools.partial(
    dispatch, 'grouped_matmul', preferred_element_type=preferred_element_type
  )
  args = (lhs, rhs, group_sizes, rhs_scales)
  if implementation is not None:
    return call(*args, implementation=implementation)

  def forward(*args):
    return call(*args, function='grouped_matmul_forward'), args

  def backward(residuals, d_out):
    d_lhs, d_rhs = call(*residuals, d_out, function='grouped_matmul_backward')
    return d_lhs, d_rhs, None, None

  return with_gradient(forward, backward, *varying.vary_alike(*args))
