"""flash_attention forward for Hopper GPUs: TMA, WGMMA, warp specialisation.

Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691, algorithm 1, in the
schedule of Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608;
see `pallas_gpu_forward`.

Which tiles a block visits, and which of them need no mask, is found outside,
from the causal order, the window and the least and greatest position and
segment of each tile, as on TPUs.

Of float8_e4m3fn inputs both products are too, as in section 3.3 there: weights
are rounded to three bits, scaled so that the greatest is 256; the output is
bfloat16. Scales of q and k belong into `scale`, that of v to the output.

Deviations from FlashAttention-3: a block is one head's, queries of a group
share K and V through the L2 cache alone.

Cost: 4 B N T S H FLOPs, about half of that if causal, tiles at the diagonal
whole. Memory: q and out once, K and V once per block of queries and kv head, if
the L2 cache holds them for the heads of a group. Lengths that are not whole
tiles, and head dims other than 64, 128 and 256, are padded first, which copies;
8-bit values are transposed first.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import hopper
from pallas_kernels.common import tuned
from pallas_kernels.flash_attention import pallas_gpu_forward
from pallas_kernels.flash_attention.forward_plan import NEVER
from pallas_kernels.flash_attention.forward_plan import features
from pallas_kernels.flash_attention.forward_plan import ranges
from pallas_kernels.flash_attention.gradient import differentiable
from pallas_kernels.flash_attention.pallas_gpu_backward import (
  flash_attention_backward,
)
from pallas_kernels.flash_attention.pallas_gpu_forward import Plan
from pallas_kernels.flash_attention.reference import out_dtype
from pallas_kernels.flash_attention.reference import pair

__all__ = [
  'candidates',
  'features',
  'flash_attention',
  'flash_attention_backward',
  'flash_attention_forward',
]

_HEAD_DIMS = (64, 128, 256)
_DTYPES = ('bfloat16', 'float16', 'float8_e4m3fn')
# Log-sum-exps, barriers, and what the compiler takes.
_SMALL_BYTES = 3072
# By head dim: what fits registers and shared memory.
_DEFAULTS = {
  64: dict(warpgroups=2, block_kv=128, stages=3),
  128: dict(warpgroups=2, block_kv=128, stages=2),
  256: dict(warpgroups=2, block_kv=64, stages=2),
}


def flash_attention(*args, **static):
  """See `api.flash_attention`; returns the output and the log-sum-exp."""
  return differentiable(
    functools.partial(flash_attention_forward, **static),
    functools.partial(flash_attention_backward, **static),
    *args,
  )


def candidates(chip_name: str, *args: Any, **static: Any) -> list[dict]:
  """Configurations worth a try."""
  del chip_name, static
  h, itemsize = head_dim(args[0].shape[3]), args[0].dtype.itemsize
  return [
    dict(warpgroups=warpgroups, block_kv=block_kv, stages=stages)
    for warpgroups in (2, 3)
    for block_kv in (64, 128, 192)
    for stages in (2, 3, 4)
    if _fits(h, itemsize, warpgroups, block_kv, stages)
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
    config: `warpgroups` that compute, 64 rows each; `block_kv`, keys of a tile;
      `stages`, tiles held.

  Raises:
    NotImplementedError: Not a Hopper GPU, a head dim above 256, another dtype
      than bfloat16, float16 and float8_e4m3fn, or a scale that is not positive.
  """
  check(q, k, v, scale)
  h = head_dim(q.shape[3])
  if config is None:
    config = tuned.lookup(
      'flash_attention',
      hopper.current().name,
      features(q, k),
      function='flash_attention_forward_gpu',
    )
  config = _DEFAULTS[h] | dict(config)
  if not _fits(h, q.dtype.itemsize, **config):
    raise ValueError(f'{config=} does not fit a head dim of {h}')
  inputs = dict(q=q, k=k, v=v, window=window)
  inputs |= dict(q_positions=q_positions, kv_positions=kv_positions)
  inputs['q_segments'], inputs['kv_segments'] = pair(segment_ids)
  inputs['sinks'] = None if sinks is None else sinks.astype(jnp.float32)
  inputs = _padded(inputs, config, h)
  names = tuple(n for n in pallas_gpu_forward.INPUTS if inputs[n] is not None)
  plan = Plan(
    **config,
    num_workers=hopper.current().num_sms,
    own_out=_has_own_out(h, q.dtype.itemsize, **config),
    scale=scale,
    soft_cap=soft_cap,
    dtype=q.dtype,
    out_dtype=out_dtype(q),
    has=names,
  )
  out, lse = pallas_gpu_forward.call(plan, inputs)
  t = q.shape[1]
  return out[:, :t, :, : q.shape[3]], lse[:, :, :t]


def check(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
  """Raises what `flash_attention_forward` raises."""
  hopper.current()
  head_dim(q.shape[3])
  if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _DTYPES:
    raise NotImplementedError(
      f'q, k and v are {q.dtype.name}, {k.dtype.name} and {v.dtype.name}, and '
      f'must be alike one of {", ".join(_DTYPES)}'
    )
  if scale <= 0:
    raise NotImplementedError(f'{scale=} is not positive')


def head_dim(h: int) -> int:
  """What a head dim is padded to."""
  for size in _HEAD_DIMS:
    if h <= size:
      return size
  raise NotImplementedError(f'head_dim {h} > {_HEAD_DIMS[-1]}')


def _fits(h, itemsize, warpgroups, block_kv, stages):
  """Whether registers and shared memory suffice."""
  registers = {2: 240, 3: 160}[warpgroups]
  # Scores, their weights twice in 16 bits, the sum; some more for the rest.
  needed = 2 * block_kv // 2 + h // 2 + 32
  used = _smem_bytes(h, itemsize, warpgroups, block_kv, stages)
  return needed <= registers and used <= hopper.current().smem_bytes


def _smem_bytes(h, itemsize, warpgroups, block_kv, stages):
  """Of queries, tiles, and the weights and results of 8-bit inputs."""
  rows = warpgroups * hopper.ROWS
  tiles = itemsize * h * (rows + 2 * stages * block_kv)
  extra = rows * (block_kv + 2 * h) if itemsize == 1 else 0
  return tiles + extra + _SMALL_BYTES


def _has_own_out(h, itemsize, warpgroups, block_kv, stages):
  """Whether results lie beside the queries, or take their place."""
  used = _smem_bytes(h, itemsize, warpgroups, block_kv, stages)
  out = 2 * h * warpgroups * hopper.ROWS
  return itemsize == 1 or used + out <= hopper.current().smem_bytes


def _padded(inputs, config, h):
  """Whole tiles, and what to visit."""
  q, k = inputs['q'], inputs['k']
  block_q = config['warpgroups'] * hopper.ROWS
  t, s = -q.shape[1] % block_q, -k.shape[1] % config['block_kv']
  width = h - q.shape[3]
  pad4 = lambda x, n: _pad(x, ((0, 0), (0, n), (0, 0), (0, width)))
  pad2 = lambda x, n, value=0: _pad(x, ((0, 0), (0, n)), value)
  indices = lambda x: jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  i, j = inputs['q_positions'], inputs['kv_positions']
  by_position = i is not None or j is not None
  i = pad2(indices(q) if i is None else i, t)
  j = pad2(indices(k) if j is None else j, s, NEVER)
  q_segments = pad2(inputs['q_segments'], t)
  kv_segments = pad2(inputs['kv_segments'], s)
  window = jnp.int32(NEVER) if inputs['window'] is None else inputs['window']
  if not by_position:
    window = jnp.minimum(window, q.shape[1])
  visit = ranges(
    *(i, j, window, q_segments, kv_segments),
    block_q=block_q,
    chunk=config['block_kv'],
  ).reshape(-1, 4)
  # The kernel visits one tile at the least.
  first = jnp.minimum(visit[:, 0], j.shape[1] // config['block_kv'] - 1)
  end = jnp.maximum(visit[:, 3], first + 1)
  v = pad4(inputs['v'], s)
  return dict(
    q=pad4(q, t),
    k=pad4(k, s),
    v=v.transpose(0, 2, 3, 1) if v.dtype.itemsize == 1 else v,
    ranges=jnp.stack([first, visit[:, 1], visit[:, 2], end], 1).reshape(-1),
    window=None if inputs['window'] is None else window[None],
    q_positions=i if by_position else None,
    kv_positions=j if by_position else None,
    q_segments=q_segments,
    kv_segments=kv_segments,
    sinks=inputs['sinks'],
  )


def _pad(x, widths, value=0):
  if x is None or not any(n for pair in widths for n in pair):
    return x
  return jnp.pad(x, widths, constant_values=value)
