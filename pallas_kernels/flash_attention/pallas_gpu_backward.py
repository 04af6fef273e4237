"""flash_attention backward for Hopper GPUs: a kernel for dq, one for dk and dv.

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 2, with the
warp specialisation of Shah et al., "FlashAttention-3",
https://arxiv.org/abs/2407.08608, section 3.1, both from memory. With p the
probabilities, recomputed from the log-sum-exp, and offset the row sums of
out * d_out, less the gradient of the log-sum-exp,

  dv = p^T d_out,  ds = p * (d_out v^T - offset),  dk = ds^T q,  dq = ds k.

The papers compute the three in one kernel over blocks of keys, five matmuls of
a tile, and add the parts of dq up in HBM with atomics. Here dq has a kernel of
its own, over blocks of queries: seven matmuls, but no float32 dq in HBM, no
order of additions that differs from run to run, and nothing that JAX's
interpreter of GPU kernels cannot run (it has neither atomics nor reducing
copies). The one kernel would not win 7 to 5: a tile's ds and its part of dq
pass through shared memory, whose bandwidth is then the limit before the tensor
cores. Of a tile of 64 x 128 at head dim 128, counting what WGMMAs read, and 128
bytes a cycle, it takes 2,944 cycles there against 2,560 on the tensor cores;
the two kernels take 3,072 there and 3,584 on the tensor cores.

Query heads of a group add to one dk and dv in registers, so K and V are not
repeated (Ainslie et al., "GQA", https://arxiv.org/abs/2305.13245). Where that
would leave multiprocessors idle, a group is added up in a few parts.

Cost: 14 B N T S H FLOPs, half of that if causal. HBM: each array once if L2
holds a head's keys and queries. Head dims are filled up to 64, 128 or 256,
lengths to multiples of 128: copies of q, k, v and d_out where they are not.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import tuned
from pallas_kernels.common.hopper import LOG2_E
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.flash_attention import forward_plan
from pallas_kernels.flash_attention import pallas_gpu_backward_dkv
from pallas_kernels.flash_attention import pallas_gpu_backward_dq
from pallas_kernels.flash_attention import pallas_gpu_backward_tiles as tiles
from pallas_kernels.flash_attention import pallas_gpu_backward_wide
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import BLOCK
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import CHUNK
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Inputs
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Plan
from pallas_kernels.flash_attention.reference import NO_KEYS
from pallas_kernels.flash_attention.reference import pair

_HEAD_DIMS = (64, 128, 256)
# Position of keys that only fill up the last block, and what exceeds all
# windows; no difference of the two leaves int32.
_NEVER = 2**30
# The greatest head dim at which a warpgroup holds both dk and dv of its keys.
_NARROW = 128
# All but one are under way: that hides more than a copy's latency.
_MOST_STAGES = 4


def backward_features(q, k, *_, **__) -> dict[str, Any]:
  """What the best configuration depends on."""
  return dict(
    length=q.shape[1],
    head_dim=q.shape[3],
    group=q.shape[2] // k.shape[2],
    dtype=q.dtype.name,
  )


def backward_candidates(chip_name: str, q, *args, **static) -> list[dict]:
  """Configurations worth a try."""
  del chip_name, args, static
  most = _MOST_STAGES if _padded_head_dim(q) <= _NARROW else 2
  return [
    dict(dq_stages=dq_stages, dkv_stages=dkv_stages)
    for dq_stages in range(2, most + 1)
    for dkv_stages in range(2, most + 1)
  ]


def flash_attention_backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None,
  window: jax.Array | None,
  sinks: jax.Array | None,
  q_positions: jax.Array | None,
  kv_positions: jax.Array | None,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
  d_lse: jax.Array | None,
  *,
  scale: float,
  soft_cap: float | None,
  config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """Returns the gradients of q, k, v and of sinks, `None` without sinks.

  Args:
    q: See `api.flash_attention`, as for all arrays; bfloat16 as k, v and d_out.
    k: Keys.
    v: Values.
    segment_ids: Segments, of both or a pair, or `None`.
    window: Int32 scalar or `None`.
    sinks: Logits or `None`.
    q_positions: Of the queries, or `None`; from 0 to 2**30.
    kv_positions: Of the keys, or `None`.
    out: The result of the forward, [B,T,N,H].
    lse: Its float32 log-sum-exp, [B,N,T].
    d_out: Gradient of `out`.
    d_lse: Gradient of `lse`, or `None` for zeros.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    config: `dq_stages` tiles of keys and `dkv_stages` tiles of queries in
      shared memory at once; reduced to what fits.

  Raises:
    NotImplementedError: A head dim above 256; one above 128 with positions and
      segments, which do not fit in shared memory beside the rest; another dtype
      than bfloat16; a GPU that is not a Hopper.
  """
  dtypes = [x.dtype.name for x in (q, k, v, d_out)]
  if set(dtypes) != {'bfloat16'}:
    raise NotImplementedError(f'q, k, v, d_out of {dtypes}, not bfloat16')
  if config is None:
    config = tuned.lookup(
      'flash_attention',
      hopper.current().name,
      backward_features(q, k),
      function='flash_attention_backward',
    )
  # A fusion of XLA's; as an einsum it could be made many tiny matmuls.
  products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
  offset = products.sum(axis=3).swapaxes(1, 2)
  if d_lse is not None:
    offset -= d_lse
  # Of queries without keys every exponential is 0.
  safe_lse = jnp.where(lse == NO_KEYS, -NO_KEYS, lse)
  dq, dk, dv = _call(
    (q, k, v, d_out),
    (safe_lse * LOG2_E, offset),
    (q_positions, kv_positions),
    None if segment_ids is None else pair(segment_ids),
    window,
    config,
    scale=scale,
    soft_cap=soft_cap,
  )
  d_sinks = None
  if sinks is not None:
    p_BNT = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse)
    d_sinks = -(p_BNT * offset).sum((0, 2)).astype(sinks.dtype)
  return dq, dk, dv, d_sinks


def _call(
  arrays, stats, positions, segments, window, config, *, scale, soft_cap
):
  """Fills up to whole blocks; calls the kernels; cuts back."""
  q, k = arrays[:2]
  (_, t, n, h), s = q.shape, k.shape[1]
  padded = _padded_head_dim(q)
  plan = Plan(
    head_dim=padded,
    group=n // k.shape[2],
    parts=1,
    stages=2,
    v_stages=1,
    scale=scale,
    soft_cap=soft_cap,
    kinds=1 if segments is None else 2,
    by_position=positions != (None, None),
    has_window=window is not None,
  )
  window = jnp.int32(_NEVER) if window is None else window
  window = jnp.minimum(window, _NEVER)
  positions = _positions(positions, t, s)
  if segments is not None:
    segments = [_fill(x, 1, mode='edge') for x in segments]
  inputs = Inputs(
    *(_fill(jnp.pad(x, ((0, 0),) * 3 + ((0, padded - h),)), 1) for x in arrays),
    q_info=_q_info(positions[0], [_fill(x, 2) for x in stats], segments),
    kv_info=_kv_info(positions[1], segments),
    window=window[None],
    ranges=None,
  )
  dq = pallas_gpu_backward_dq.dq(
    _with_stages(
      plan, pallas_gpu_backward_dq, config.get('dq_stages', _MOST_STAGES)
    ),
    inputs._replace(ranges=_ranges(positions, segments, window, BLOCK)),
  )
  kernel, block = pallas_gpu_backward_dkv, BLOCK
  if padded > _NARROW:
    kernel, block = pallas_gpu_backward_wide, ROWS
  plan = _in_parts(plan, inputs.k.shape, block)
  # A key "sees" the queries that see it if the line is turned round.
  positions = [-x for x in positions[::-1]]
  segments = None if segments is None else segments[::-1]
  sums = kernel.dk_and_dv(
    _with_stages(plan, kernel, config.get('dkv_stages', _MOST_STAGES)),
    inputs._replace(ranges=_ranges(positions, segments, window, block)),
  )
  dk, dv = (_add_parts(x, plan.parts) for x in sums)
  return dq[:, :t, :, :h], dk[:, :s, :, :h], dv[:, :s, :, :h]


def _in_parts(plan, kv_shape, block):
  """The plan, with kv heads in as many parts as keep the GPU busy."""
  b, s, kv_heads, _ = kv_shape
  blocks = b * (s // block) * kv_heads
  for parts in range(1, plan.group + 1):
    if plan.group % parts == 0 and blocks * parts >= hopper.current().num_sms:
      break
  return dataclasses.replace(plan, parts=parts, group=plan.group // parts)


def _add_parts(x, parts):
  if parts == 1:
    return x
  b, s, heads, h = x.shape
  x = x.reshape(b, s, heads // parts, parts, h)
  return x.sum(3, dtype=jnp.float32).astype(x.dtype)


def _padded_head_dim(q):
  for head_dim in _HEAD_DIMS:
    if q.shape[3] <= head_dim:
      return head_dim
  raise NotImplementedError(f'head_dim {q.shape[3]} > {_HEAD_DIMS[-1]}')


def _with_stages(plan, kernel, most):
  """The plan with as many stages as asked for and as fit."""
  stages = [(n, n) for n in range(_MOST_STAGES, 1, -1)] + [(2, 1)]
  for k_stages, v_stages in stages:
    plan = dataclasses.replace(plan, stages=k_stages, v_stages=v_stages)
    needed = tiles.smem_bytes(kernel.scratch(plan, jnp.bfloat16))
    if k_stages <= max(most, 2) and needed <= hopper.current().smem_bytes:
      return plan
  raise NotImplementedError(
    f'{needed} bytes of shared memory for head_dim {plan.head_dim}, '
    f'{plan.by_position=}, {plan.kinds=}'
  )


def _fill(x, axis, **how):
  extra = -x.shape[axis] % BLOCK
  pad = [(0, extra if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, pad, **how)


def _positions(positions, t, s):
  """Of whole blocks; what fills up the keys is seen by no query."""
  q, kv = positions
  if q is None and kv is None:
    index = jnp.arange(t + -t % BLOCK, dtype=jnp.int32)[None]
    return index, index
  index = lambda x, length: jnp.arange(length)[None] if x is None else x
  return (
    _fill(index(q, t).astype(jnp.int32), 1, mode='edge'),
    _fill(index(kv, s).astype(jnp.int32), 1, constant_values=_NEVER),
  )


def _q_info(positions, stats, segments):
  bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in stats]
  rows = [positions[:, None], *bits]
  if segments is not None:
    rows.append(segments[0][:, None])
  shape = bits[0].shape
  return jnp.stack([jnp.broadcast_to(x, shape) for x in rows], axis=2)


def _kv_info(positions, segments):
  if segments is None:
    return positions[:, None]
  return jnp.stack(jnp.broadcast_arrays(positions, segments[1]), axis=1)


def _ranges(positions, segments, window, block):
  return forward_plan.ranges(
    *positions,
    window,
    *((None, None) if segments is None else segments),
    block_q=block,
    chunk=CHUNK,
  )
