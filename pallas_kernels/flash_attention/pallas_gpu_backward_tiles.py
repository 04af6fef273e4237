"""Sizes of the flash_attention backward on Hopper, and the math of a tile.

A *tile* is a block of queries against a block of keys. Which of them hold work
is found before the kernels, by `forward_plan.ranges`; here is what both kernels
do to the scores of one.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper
from pallas_kernels.common.hopper import LOG2_E
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.flash_attention.reference import NO_KEYS

# Scores less log-sum-exp, or in place of a tanh: the exponential vanishes, and
# stays 0 times a slope that is finite.
_MASKED = NO_KEYS
_MASKED_TANH = -1e9
# Registers of a thread of the warpgroup that copies, and of two that compute:
# 128 * (24 + 2 * 240) are all that there are.
COPY_REGISTERS = 24
REGISTERS = 240
# Of arrays in shared memory.
_ALIGNMENT = 1024
_BARRIER_BYTES = 8
# Warpgroups of a block, the last one copies.
CONSUMERS = 2
WARPGROUPS = CONSUMERS + 1
# Queries or keys of a block, those that the computing warpgroups share.
BLOCK = CONSUMERS * ROWS
# The others of a tile. With 128, s and dp would take all registers.
CHUNK = 64
# Up to this head dim there are registers for all that is read in every step.
NARROWEST = 64
# What is where in `q_info`.
POSITION, LSE, OFFSET, SEGMENT = range(4)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes and options of one kernel.

  Attributes:
    head_dim: Of queries, keys and values.
    group: Query heads of a kv head; in the kernel of dk and dv, of one sum.
    parts: Sums of a kv head, of some of its query heads each.
    stages: Tiles whose inputs are in shared memory at once.
    v_stages: The same of those inputs that are done with sooner.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    kinds: Integers of each token that masks read: its position, and its segment
      if there are any.
    by_position: Whether positions are anything but indices.
    has_window: Whether there is a window.
  """

  head_dim: int
  group: int
  parts: int
  stages: int
  v_stages: int
  scale: float
  soft_cap: float | None
  kinds: int
  by_position: bool
  has_window: bool

  @property
  def q_kinds(self) -> int:
    """Numbers of a query."""
    return 2 + self.kinds


class Inputs(NamedTuple):
  """What a kernel reads: arrays, or in its body their references.

  Attributes:
    q: [B,T,N,H], all lengths multiples of the blocks.
    k: [B,S,K,H].
    v: [B,S,K,H].
    d_out: [B,T,N,H].
    q_info: Of queries: position, bits of log-sum-exp in base 2 and of offset,
      and segment if there are any, int32 [B, N, 2 + kinds, T].
    kv_info: Of keys: position, and segment, int32 [1 or B, kinds, S].
    window: Int32 [1].
    ranges: Tiles to visit, see `forward_plan.ranges`.
  """

  q: Any
  k: Any
  v: Any
  d_out: Any
  q_info: Any
  kv_info: Any
  window: Any
  ranges: Any


class Visits(NamedTuple):
  """Tiles that a block visits, [first, last), all seen in [whole, end).

  Attributes:
    first: The first.
    whole: The first without a mask.
    end: After the last of those.
    last: After the last.
  """

  first: jax.Array
  whole: jax.Array
  end: jax.Array
  last: jax.Array


def visits(inputs: Inputs, block: Any, num_blocks: int, batch: Any) -> Visits:
  """Of a block; the table may be for all of the batch."""
  has_one_table = inputs.ranges.shape[0] == 4 * num_blocks
  row = block if has_one_table else batch * num_blocks + block
  return Visits(*(inputs.ranges[4 * row + x] for x in range(4)))


def row_of(kv_info: Any, batch: Any) -> Any:
  """Which row is a sequence's."""
  return 0 if kv_info.shape[0] == 1 else batch


def as_float(bits: jax.Array) -> jax.Array:
  """What log-sum-exp and offset are."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def smem_bytes(scratch: dict[str, Any]) -> int:
  """Shared memory that a kernel's scratch takes."""
  barriers = [x for x in scratch.values() if isinstance(x, plgpu.Barrier)]
  arrays = [x for x in scratch.values() if not isinstance(x, plgpu.Barrier)]
  sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
  return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes) + sum(
    _BARRIER_BYTES * math.prod(x.num_barriers) for x in barriers
  )


def stand_ins(dtype: DTypeLike) -> dict[str, Any]:
  """Scratch of `multiply`: nothing, save when interpreted."""
  if not hopper.is_interpreted():
    return {}
  return dict(factor_smem=hopper.tile((CONSUMERS, ROWS, CHUNK), dtype))


def multiply(acc: Any, a: jax.Array, b: Any, smem: dict[str, Any]) -> None:
  """Adds to an accumulator the product of p or ds with a tile, as WGMMA does.

  The interpreter takes factors from shared memory alone.
  """
  if hopper.is_interpreted():
    stand_in = smem['factor_smem'].at[jax.lax.axis_index('wg')]
    stand_in[...] = a
    plgpu.commit_smem()
    a = stand_in
  plgpu.wgmma(acc, a, b)


def factor(ref: Any, plan: Plan, most: int) -> Any:
  """What WGMMAs multiply again and again: in registers up to a head dim.

  That spares shared memory, whose bandwidth is scarce. The interpreter takes
  factors from shared memory alone.
  """
  if plan.head_dim > most or hopper.is_interpreted():
    return None
  return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)


def registers(is_copying: bool) -> None:
  """Takes registers from the warpgroup that copies, for the others."""
  if is_copying:
    plgpu.set_max_registers(COPY_REGISTERS, action='decrease')
  else:
    plgpu.set_max_registers(REGISTERS, action='increase')


def hidden_zero(number: jax.Array) -> jax.Array:
  """0, for the number of a step, but the compiler does not know.

  Added to an index of shared memory that is the same in every step, it keeps
  the addresses of the WGMMAs from being computed before the loop: all in
  registers, where others would be spilled.
  """
  return jax.lax.shift_right_logical(number, 30)


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
  """A vector along the axis of a tile, the same all over the other axis."""
  x = plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1 - axis))
  return jax.lax.broadcast_in_dim(x, shape, (axis,))


def probabilities(
  s: jax.Array,
  lse: jax.Array,
  plan: Plan,
  *,
  is_whole: jax.Array,
  masked: Callable[[jax.Array, float], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """p of a tile's raw products, and p times the slope of the soft cap.

  Args:
    s: Products of queries and keys.
    lse: Log-sum-exp in base 2, in the shape of the tile.
    plan: Of the kernel.
    is_whole: Whether every query sees every key.
    masked: Replaces what is not to be seen where that is not so.
  """
  mask = lambda x, low: jax.lax.cond(
    is_whole, lambda x: x, lambda x: masked(x, low), x
  )
  if plan.soft_cap is None:
    p = jnp.exp2(mask(s * (plan.scale * LOG2_E) - lse, _MASKED))
    return p, p
  # One array to mask, of which both follow; more would not fit in registers.
  tanh = mask(jnp.tanh(s * (plan.scale / plan.soft_cap)), _MASKED_TANH)
  p = jnp.exp2(tanh * (plan.soft_cap * LOG2_E) - lse)
  return p, p * (1 - tanh * tanh)


def mask_of(
  plan: Plan,
  window: Any,
  q_info: Callable[[int], jax.Array],
  kv_info: Callable[[int], jax.Array],
  *,
  q_axis: int,
) -> Callable[[jax.Array, float], jax.Array]:
  """Makes values as low as told where the query does not see the key.

  Args:
    plan: Of the kernel.
    window: Keys that a query sees, read only if there is one.
    q_info: Loads positions (0) and segments (1) of the queries.
    kv_info: The same of the keys.
    q_axis: Where queries are in the tile, keys are on the other axis.
  """

  def masked(s, low):
    of_q = lambda x: along(x, s.shape, q_axis)
    of_kv = lambda x: along(x, s.shape, 1 - q_axis)
    q, kv = q_info(0), of_kv(kv_info(0))
    mask = of_q(q) >= kv
    if plan.has_window:
      mask &= of_q(q - window) < kv
    if plan.kinds > 1:
      mask &= of_q(q_info(1)) == of_kv(kv_info(1))
    return jnp.where(mask, s, low)

  return masked
