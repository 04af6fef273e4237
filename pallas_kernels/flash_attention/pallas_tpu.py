"""flash_attention forward for TPUs: a head's keys in VMEM, masks at the edges.

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 1, with the
query heads of a group folded into the rows of a tile (Ainslie et al., "GQA",
https://arxiv.org/abs/2305.13245), so that K and V are neither repeated nor read
once per query head.

A grid step holds one block of query rows and a *run* of up to 16,384 keys,
which it visits in chunks. What a block of queries must visit is a contiguous
range of chunks, in the middle of which no tile needs a mask. Both ranges are
found outside, from the causal order, the window, the least and greatest
position and segment of each block and chunk; runs outside of them are not
fetched. In the middle each product q k^T is issued before the softmax of the
chunk before it, so that the matrix unit and the vector unit work at once.
Exponentials are base 2, their scale folded into q.

A causal diagonal that is one of a square tile is visited as an upper quarter
and a lower half. A tile of scores is larger than the registers: the compiler
keeps it in VMEM, which its statistics call spills.

Deviations: a bfloat16 q is rounded once more after that scaling. Positions in
any order are correct, but only the first contiguous stretch of unmasked chunks
is recognised, and chunks between visible ones are computed.

Cost: 4 B N T S H FLOPs, about half of that if causal; float32 inputs multiply
in full precision. HBM: q and out once, K and V once per kv head (once per block
of queries, as far as visible, if there are several runs), 4 bytes of log-sum-
exp per row; position and segment arrays are read as 128 lanes per query. VMEM:
two runs of K and V, and about 4 MiB for 512 rows and 512-key chunks.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.common import chip
from pallas_kernels.common import varying
from pallas_kernels.flash_attention import forward_plan
from pallas_kernels.flash_attention.forward_kernel import LANES
from pallas_kernels.flash_attention.forward_kernel import LOG2_E
from pallas_kernels.flash_attention.forward_kernel import Plan
from pallas_kernels.flash_attention.forward_kernel import forward_kernel
from pallas_kernels.flash_attention.gradient import differentiable
from pallas_kernels.flash_attention.pallas_tpu_backward import (
  flash_attention_backward,
)
from pallas_kernels.flash_attention.reference import pair

_MAX_HEAD_DIM = 256


def flash_attention(*args, **static):
  """See `api.flash_attention`; returns the output and the log-sum-exp."""
  return differentiable(
    functools.partial(flash_attention_forward, **static),
    functools.partial(flash_attention_backward, **static),
    *args,
  )


features = forward_plan.features


def candidates(chip_name: str, *args: Any, **static: Any) -> list[dict]:
  """Configurations worth a try."""
  del chip_name, args, static
  return [
    dict(rows=rows, chunk=chunk, run=run, unroll=unroll)
    for rows in (512, 1024)
    for chunk in (512, 1024)
    for run in (4096, 16384)
    for unroll in (4, 8)
  ]


def flash_attention_forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None,
  window: jax.Array | None,
  sinks: jax.Array | None,
  q_positions: jax.Array | None,
  kv_positions: jax.Array | None,
  *,
  scale: float,
  soft_cap: float | None,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B,T,N,H] and the float32 log-sum-exp [B,N,T].

  Args:
    q: See `api.flash_attention`, as for all arrays.
    k: Keys.
    v: Values.
    segment_ids: Segments, of both or a pair, or `None`.
    window: Int32 scalar or `None`.
    sinks: Logits or `None`.
    q_positions: Of the queries, or `None`.
    kv_positions: Of the keys, or `None`.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    config: `rows` of a block of queries, all heads of the group together, keys
      of a `chunk` and of a `run`, and `unroll`, tiles in the body of the loop
      over unmasked chunks. Shrunk to the input and to VMEM.

  Raises:
    NotImplementedError: A head dim above 256, or another dtype than float32 and
      bfloat16.
  """
  check(q, k, v)
  plan = forward_plan.make_plan(
    q,
    k,
    config,
    scale=scale,
    soft_cap=soft_cap,
    by_position=q_positions is not None or kv_positions is not None,
    by_segment=segment_ids is not None,
    has_window=window is not None,
    has_sinks=sinks is not None,
  )
  return _pad_and_call(
    plan, (q, k, v), segment_ids, window, sinks, q_positions, kv_positions
  )


def check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Raises what `flash_attention_forward` raises."""
  if q.shape[3] > _MAX_HEAD_DIM:
    raise NotImplementedError(f'head_dim {q.shape[3]} > {_MAX_HEAD_DIM}')
  if not q.dtype == k.dtype == v.dtype or q.dtype.name not in (
    'float32',
    'bfloat16',
  ):
    raise NotImplementedError(f'{q.dtype=}, {k.dtype=}, {v.dtype=}')


def _pad_and_call(
  plan, arrays, segment_ids, window, sinks, q_positions, kv_positions
):
  """Fills up to whole blocks; says what to visit; cuts back."""
  q, k, v = arrays
  t, s = q.shape[1], k.shape[1]
  indices = lambda n: jnp.arange(n, dtype=jnp.int32)[None]
  i = indices(t) if q_positions is None else q_positions
  j = indices(s) if kv_positions is None else kv_positions
  pad_q = -t % plan.block_q
  pad_kv = -s % plan.chunk
  i = _pad(i, pad_q)
  j = jnp.pad(j, ((0, 0), (0, pad_kv)), constant_values=forward_plan.NEVER)
  q_segments = kv_segments = None
  if segment_ids is not None:
    q_segments, kv_segments = (
      _pad(x, n)
      for x, n in zip(pair(segment_ids), (pad_q, pad_kv), strict=True)
    )
  if window is None:
    window = jnp.int32(forward_plan.NEVER)
  if not plan.by_position:
    window = jnp.minimum(window, t)
  ranges = forward_plan.ranges(
    *(i, j, window, q_segments, kv_segments),
    block_q=plan.block_q,
    chunk=plan.chunk,
  )
  if not plan.by_position:
    i = j = None
  zeros = lambda x, n: jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))
  out, lse = _call(
    plan,
    zeros(q, pad_q),
    zeros(k, pad_kv),
    zeros(v, pad_kv),
    ranges,
    window[None],
    sinks,
    (i, j),
    (q_segments, kv_segments),
  )
  return out[:, :t], lse[:, :, :t]


@dataclasses.dataclass(frozen=True)
class Specs:
  """Blocks of a step of the grid (row, head, block of queries, run of keys).

  Attributes:
    operands: Positions and segments, as the kernel reads them.
    inputs: Of q, k, v and of the operands.
    results: Of the output and the log-sum-exp.
  """

  operands: list[jax.Array]
  inputs: list[pl.BlockSpec]
  results: list[pl.BlockSpec]


def specs(
  plan: Plan,
  head_dim: int,
  stride: int,
  positions: tuple[jax.Array, jax.Array] | tuple[None, None],
  segments: tuple[jax.Array, jax.Array] | tuple[None, None],
) -> Specs:
  """Blocks of all arrays; index maps take the place, then the scalars.

  Args:
    plan: Sizes.
    head_dim: H.
    stride: Blocks of queries if rows of the batch have ranges of their own,
      else 0.
    positions: Of queries and keys, or two `None`.
    segments: The same.
  """

  def run_of(b, i, r, ranges):
    at = 4 * (b * stride + i)
    first = jax.lax.div(ranges[at], plan.run_chunks)
    last = jax.lax.div(jnp.maximum(ranges[at + 3] - 1, 0), plan.run_chunks)
    return jnp.minimum(jnp.maximum(r, first), last)

  kv_spec = pl.BlockSpec(
    (1, 1, plan.run_chunks * plan.chunk, head_dim),
    lambda b, h, i, r, ranges, *_: (
      b,
      jax.lax.div(h, plan.parts),
      run_of(b, i, r, ranges),
      0,
    ),
  )
  q_spec = pl.BlockSpec(
    (1, 1, plan.group, plan.block_q, head_dim),
    lambda b, h, i, *_: (b, h, 0, i, 0),
  )
  lse_spec = pl.BlockSpec(
    (1, 1, 1, plan.rows // LANES, LANES),
    lambda b, h, i, *_: (b, h, i, 0, 0),
  )
  operands, info_specs = _info(plan, positions, segments, run_of)
  return Specs(
    operands, [q_spec, kv_spec, kv_spec, *info_specs], [q_spec, lse_spec]
  )


def _call(plan, q, k, v, ranges, window, sinks, positions, segments):
  """Transposes, calls the kernel, and transposes back."""
  b, t, n, h = q.shape
  heads, num_q = k.shape[2] * plan.parts, t // plan.block_q
  q = q.reshape(b, t, heads, plan.group, h).transpose(0, 2, 3, 1, 4)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  stride = num_q if ranges.size > 4 * num_q else 0
  blocks = specs(plan, h, stride, positions, segments)
  scalars = [ranges, window]
  if plan.has_sinks:
    scalars.append(sinks.astype(jnp.float32) * LOG2_E)
  wide = lambda width, dtype=jnp.float32: pltpu.VMEM((plan.rows, width), dtype)
  lse_shape = b, heads, num_q, plan.rows // LANES, LANES
  out, lse = pl.pallas_call(
    functools.partial(forward_kernel, plan=plan, stride=stride),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(b, heads, num_q, plan.num_runs),
      in_specs=blocks.inputs,
      out_specs=blocks.results,
      scratch_shapes=[wide(h, q.dtype), wide(LANES), wide(LANES), wide(h)],
    ),
    out_shape=[
      varying.shape(q.shape, q.dtype, q),
      varying.shape(lse_shape, jnp.float32, q),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=chip.current().vmem_bytes,
    ),
    name='flash_attention_forward',
  )(*scalars, q, k, v, *blocks.operands)
  out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
  lse = lse.reshape(b, heads, num_q, plan.group, plan.block_q)
  return out, lse.swapaxes(2, 3).reshape(b, n, t)


def _info(plan, positions, segments, run_of):
  """Positions and segments as operands: per query in a lane, per key a row."""
  operands, specs = [], []
  for x, y in (positions, segments):
    if x is None:
      continue
    # One row may be for all of the batch.
    of_x, of_y = (int(array.shape[0] > 1) for array in (x, y))
    operands += [
      jnp.broadcast_to(x[:, :, None], (*x.shape, LANES)),
      y.reshape(y.shape[0], -1, 1, plan.chunk),
    ]
    specs += [
      pl.BlockSpec(
        (1, plan.block_q, LANES),
        lambda b, h, i, *_, of_x=of_x: (b * of_x, i, 0),
      ),
      pl.BlockSpec(
        (1, plan.run_chunks, 1, plan.chunk),
        lambda b, h, i, r, ranges, *_, of_y=of_y: (
          b * of_y,
          run_of(b, i, r, ranges),
          0,
          0,
        ),
      ),
    ]
  return operands, specs


def _pad(x, n):
  """Repeats the last column, so that no range widens."""
  return jnp.pad(x, ((0, 0), (0, n)), mode='edge')


def _up(x, multiple):
  return -(-x // multiple) * multiple
