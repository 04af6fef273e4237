"""The kernel of `pallas_tpu_backward`, and its sizes."""

import dataclasses
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.flash_attention.reference import NO_KEYS

LANES = 128
LOG2_E = math.log2(math.e)
# So far below `NO_KEYS` that its exponential vanishes in rows without keys too.
_MASKED = 1e5 * NO_KEYS


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes and options of one call.

  Attributes:
    head_dim: Of queries, keys and values.
    group: Query heads that pass by one run of keys.
    parts: Times that a kv head's keys are loaded, each for `group` heads.
    block_q: Queries of a block.
    width: Queries of a tile, a divisor of `block_q`.
    chunk: Keys of a tile, another.
    sub: Keys of a step on the diagonal, a divisor of `chunk`.
    run_chunks: Chunks of a run.
    num_runs: Runs of the padded length.
    unroll: Chunks in the body of the loop over unmasked ones.
    kv_buffers: Runs of K and V in VMEM, 2 to fetch one during another.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    by_position: Whether masks read positions, not indices.
    by_segment: Whether they read segments.
    has_window: Whether there is a window.
  """

  head_dim: int
  group: int
  parts: int
  block_q: int
  width: int
  chunk: int
  sub: int
  run_chunks: int
  num_runs: int
  unroll: int
  kv_buffers: int
  scale: float
  soft_cap: float | None
  by_position: bool
  by_segment: bool
  has_window: bool

  @property
  def run(self) -> int:
    """Keys of a run."""
    return self.run_chunks * self.chunk

  @property
  def num_blocks(self) -> int:
    """Blocks of queries of the padded length."""
    return self.num_runs * self.run // self.block_q

  @property
  def num_slots(self) -> int:
    """Tiles under way at once."""
    return self.unroll * self.block_q // self.width


def backward_kernel(
  order_ref, counts_ref, fetch_ref, bounds_ref, *refs, plan, row_of
):
  """One block of queries of a head against one run of keys."""
  refs = list(refs)
  q_ref, do_ref, stats_ref, k_ref, v_ref = refs[:5]
  del refs[:5]
  q_info_ref = kv_info_ref = dq_in_ref = None
  if plan.by_position or plan.by_segment:
    q_info_ref, kv_info_ref = refs.pop(0), refs.pop(0)
  if plan.num_runs > 1:
    dq_in_ref = refs.pop(0)
  dq_ref, dk_ref, dv_ref, kt_ref, dk_sum_ref, dv_sum_ref, dq_sum_ref = refs[:7]
  p_ref, ds_ref, *slope_ref = refs[7:]
  row, run, g, i = (pl.program_id(axis) for axis in range(4))
  zeros = bounds_ref[1], bounds_ref[2]
  at = (row_of(row) * plan.num_runs + run) * plan.num_blocks + i

  @pl.when((g == 0) & (i == 0))
  def _():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.loop(0, plan.run_chunks)
    def _(c):
      keys = pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk)
      kt_ref[c] = k_ref[0, 0, keys].T

  def add(c, u, masked, first_key=0, num_keys=plan.chunk, q0=0):
    """Some keys of chunk c against the queries from q0, tile by tile."""
    for q1 in range(q0, plan.block_q, plan.width):
      slot = (u * plan.block_q + q1) // plan.width % plan.num_slots
      width = min(plan.width, plan.block_q - q1)
      add_tile(c, slot, masked, first_key, num_keys, q1, width)

  def add_tile(c, slot, masked, first_key, num_keys, q0, width):
    # Of the first query behind the first key, if both are indices.
    start = c * plan.chunk + first_key
    offset = i * plan.block_q + q0 - run * plan.run - start
    keys = pl.ds(pl.multiple_of(start, plan.sub), num_keys)
    queries = pl.ds(q0, width)
    tile = slot, slice(0, num_keys), slice(0, width)
    # That they are read where they were written, and twice, is hidden from the
    # compiler: it would keep them in registers, and spill.
    again, once_more = (
      (slot, pl.ds(pl.multiple_of(zero, num_keys), num_keys), tile[2])
      for zero in zeros
    )
    s = _dot(k_ref[0, 0, keys], q_ref[0, 0, queries], transposed=True)
    if plan.soft_cap is None:
      s *= plan.scale * LOG2_E
    else:
      tanh = jnp.tanh(s * (plan.scale / plan.soft_cap))
      slope_ref[0][tile] = (1 - tanh * tanh).astype(p_ref.dtype)
      s = tanh * (plan.soft_cap * LOG2_E)
    if masked:
      info = None
      if q_info_ref is not None:
        kv_info = kv_info_ref[0, c, :, first_key : first_key + num_keys]
        info = (q_info_ref[0, :, queries], kv_info)
      mask = _mask(plan, s.shape, offset, bounds_ref[0], info)
      s = jnp.where(mask, s, _MASKED)
    p = jnp.exp2(s - stats_ref[0, 0, 0:1, queries])
    p_ref[tile] = p.astype(p_ref.dtype)
    dp = _dot(v_ref[0, 0, keys], do_ref[0, 0, queries], transposed=True)
    ds = p_ref[tile].astype(jnp.float32)
    ds *= dp - stats_ref[0, 0, 1:2, queries]
    if plan.soft_cap is not None:
      ds *= slope_ref[0][tile].astype(jnp.float32)
    ds_ref[tile] = ds.astype(ds_ref.dtype)
    dv_sum_ref[keys] += _dot(p_ref[again], do_ref[0, 0, queries])
    dk_sum_ref[keys] += _dot(ds_ref[again], q_ref[0, 0, queries])
    kt = kt_ref[c, :, first_key : first_key + num_keys]
    dq_sum_ref[:, queries] += _dot(kt, ds_ref[once_more])

  @pl.when(fetch_ref[at] == i)
  def _():
    dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)
    chunk_of = lambda x: order_ref[at * plan.run_chunks + x]
    whole, visited = counts_ref[2 * at], counts_ref[2 * at + 1]
    unrolled = whole // plan.unroll

    @pl.loop(0, unrolled)
    def _(x):
      for u in range(plan.unroll):
        add(chunk_of(x * plan.unroll + u), u, masked=False)

    @pl.loop(unrolled * plan.unroll, whole)
    def _(x):
      add(chunk_of(x), 0, masked=False)

    @pl.loop(whole, visited)
    def _(x):
      add(chunk_of(x), 0, masked=True)

    if not plan.by_position:
      first = i * plan.block_q - run * plan.run

      @pl.when((first >= 0) & (first < plan.run))
      def _():
        for q0 in range(0, plan.block_q, plan.sub):
          c = first // plan.chunk + q0 // plan.chunk
          add(c, q0 // plan.sub, True, q0 % plan.chunk, plan.sub, q0)

    for q0 in range(0, plan.block_q, LANES):
      some = pl.ds(q0, LANES)
      dq = dq_sum_ref[:, some].T * plan.scale
      if dq_in_ref is not None:
        dq += dq_in_ref[0, 0, some]
      dq_ref[0, 0, some] = dq.astype(dq_ref.dtype)

  @pl.when((g == plan.group - 1) & (i == plan.num_blocks - 1))
  def _():
    dk_ref[0, 0] = (dk_sum_ref[...] * plan.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_sum_ref[...].astype(dv_ref.dtype)


def _mask(plan, shape, offset, window, info):
  """Whether each key, in rows, is seen by each query, in lanes."""
  kinds = []
  if info is not None:
    kinds = [
      (q[None], _column(kv, shape[1])) for q, kv in zip(*info, strict=True)
    ]
  if plan.by_position:
    q, kv = kinds.pop(0)
    behind = q - kv
  else:
    behind = offset + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    behind -= jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  mask = behind >= 0
  if plan.has_window:
    mask &= behind < window
  for q, kv in kinds:
    mask &= q == kv
  return mask


def _column(x, width):
  """[keys] to [keys, width]."""
  lanes = jnp.broadcast_to(x[None], (LANES, x.shape[0])).T
  return jnp.tile(lanes, (1, width // LANES))


def _dot(a, b, transposed=False):
  """a @ b, or a @ b.T, in float32; float32 operands multiply in full."""
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (1 if transposed else 0,)), ((), ())),
    precision='highest' if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
