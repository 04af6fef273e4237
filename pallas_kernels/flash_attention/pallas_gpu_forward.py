"""Body of the flash_attention forward for Hopper GPUs.

A block of a few warpgroups holds 64 query rows of one head in each; one more
warpgroup only asks for tiles of K and V, which arrive in a ring of buffers. The
product with the keys of a tile is issued together with the product of the tile
before with its values, so that the softmax of the one runs beside the other
(Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608, algorithm
2); and the warpgroups take turns at issuing them, so that one's softmax runs
beside the products of another (section 3.1).
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper
from pallas_kernels.flash_attention.reference import NO_KEYS

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Registers of a thread, of 504 for three or four warpgroups together.
_PRODUCER_REGISTERS = {2: 24, 3: 24}
_CONSUMER_REGISTERS = {2: 240, 3: 160}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes and options of the forward.

  Attributes:
    warpgroups: That compute, 64 rows each.
    block_kv: Keys of a tile.
    stages: Tiles of K and V that are held.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    dtype: Of q, k and v, and of the product with v.
    has: Names of the inputs that are there, of `INPUTS`.
  """

  warpgroups: int
  block_kv: int
  stages: int
  scale: float
  soft_cap: float | None
  dtype: DTypeLike
  has: tuple[str, ...]

  @property
  def block_q(self) -> int:
    """Queries of a block."""
    return self.warpgroups * hopper.ROWS

  @property
  def slope(self) -> float:
    """What raw scores, capped or not, are multiplied with, in base 2."""
    factor = self.scale if self.soft_cap is None else self.soft_cap
    return factor * hopper.LOG2_E


# All inputs, in order; those from `window` on are optional.
INPUTS = (
  'q',
  'k',
  'v',
  'ranges',
  'window',
  'q_positions',
  'kv_positions',
  'q_segments',
  'kv_segments',
  'sinks',
)


def call(plan: Plan, inputs: dict[str, jax.Array]) -> tuple[Any, Any]:
  """Runs the kernel on whole blocks.

  Args:
    plan: What to do.
    inputs: q [B,T,N,H], k and v [B,S,K,H] of whole tiles, H one of WGMMA's;
      ranges int32 [B or 1, blocks, 4] flattened: the first tile to visit, the
      first and the end of those without a mask, the end; window int32 [1];
      positions and segments int32 [B or 1, T or S]; sinks float32 [N].

  Returns:
    Output [B,T,N,H] and float32 log-sum-exp [B,N,T].
  """
  q = inputs['q']
  b, t, n, h = q.shape
  num_blocks = t // plan.block_q
  wgs, stages = plan.warpgroups, plan.stages
  kv_tile = hopper.tile((stages, plan.block_kv, h), plan.dtype)
  full = plgpu.Barrier(num_barriers=stages)
  free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)

  def body(*refs):
    ins = dict(zip(plan.has, refs, strict=False))
    _Block(plan, ins, *refs[len(plan.has) :]).run()

  return hopper.kernel(
    body,
    name='flash_attention_forward',
    out=(
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((b, n, t), jnp.float32),
    ),
    # Heads of a group read the same K and V at about the same time.
    grid=dict(row=b, block=num_blocks, head=n),
    scratch=[
      hopper.tile((wgs, hopper.ROWS, h), plan.dtype),
      kv_tile,
      kv_tile,
      plgpu.SMEM((wgs, hopper.ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=wgs),
      full,
      full,
      free,
      free,
      plgpu.Barrier(num_barriers=wgs),
      *hopper.stand_ins(wgs, (hopper.ROWS, h)),
    ],
    warpgroups=wgs + 1,
  )(*(inputs[name] for name in plan.has))


class _Block:
  """One block of the grid."""

  def __init__(self, plan, ins, out, lse, q, k, v, lse_smem, *scratch):
    self.plan, self.ins, self.out, self.lse = plan, ins, out, lse
    self.q, self.k, self.v, self.lse_smem = q, k, v, lse_smem
    self.q_full, self.k_full, self.v_full, *scratch = scratch
    self.k_free, self.v_free, self.turn, *self.stand_ins = scratch
    self.row, self.head = lax.axis_index('row'), lax.axis_index('head')
    num_blocks = ins['q'].shape[1] // plan.block_q
    # The last blocks of causal attention are the longest: they go first.
    self.block = num_blocks - 1 - lax.axis_index('block')
    ranges = ins['ranges']
    shared = ranges.shape[0] == 4 * num_blocks
    at = 4 * (self.block + (0 if shared else self.row * num_blocks))
    self.first, self.whole, self.whole_end, self.end = (
      ranges[at + i] for i in range(4)
    )

  def run(self):
    """Each warpgroup does its part."""
    wg = lax.axis_index('wg')
    wgs = self.plan.warpgroups

    @pl.when(wg < wgs)
    def _():
      plgpu.set_max_registers(_CONSUMER_REGISTERS[wgs], action='increase')
      self.compute(wg)

    @pl.when(wg == wgs)
    def _():
      plgpu.set_max_registers(_PRODUCER_REGISTERS[wgs], action='decrease')
      self.fetch()

  def fetch(self):
    """Asks for all tiles, as buffers become free."""
    plan, ins = self.plan, self.ins
    group = ins['q'].shape[2] // ins['k'].shape[2]
    kv_head = lax.div(self.head, jnp.int32(group))

    @pl.loop(self.first, self.end)
    def _(tile):
      step = tile - self.first
      slot = lax.rem(step, jnp.int32(plan.stages))
      keys = pl.ds(tile * plan.block_kv, plan.block_kv)
      for name, smem, full, free in (
        ('k', self.k, self.k_full, self.k_free),
        ('v', self.v, self.v_full, self.v_free),
      ):

        @pl.when(step >= plan.stages)
        def _():
          plgpu.barrier_wait(free.at[slot])

        plgpu.copy_gmem_to_smem(
          ins[name].at[self.row, keys, kv_head], smem.at[slot], full.at[slot]
        )

  def compute(self, wg):
    """Attention of 64 rows."""
    plan, ins = self.plan, self.ins
    rows = pl.ds(self.block * plan.block_q + wg * hopper.ROWS, hopper.ROWS)
    q = self.q.at[wg]
    plgpu.copy_gmem_to_smem(
      ins['q'].at[self.row, rows, self.head], q, self.q_full.at[wg]
    )
    # The first turn is the first warpgroup's.
    pl.when(wg == plan.warpgroups - 1)(
      lambda: plgpu.barrier_arrive(self.turn.at[0])
    )
    plgpu.barrier_wait(self.q_full.at[wg])
    h = q.shape[-1]
    out, m, l = hopper.with_accumulator(
      lambda acc: self.visit(wg, q, acc),
      (hopper.ROWS, h),
      *(ref.at[wg] for ref in self.stand_ins),
    )
    out, lse = self.finish(out, m, l)
    q[...] = out.astype(q.dtype)
    self.lse_smem.at[wg][...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, self.out.at[self.row, rows, self.head])
    plgpu.copy_smem_to_gmem(
      self.lse_smem.at[wg], self.lse.at[self.row, self.head, rows]
    )
    plgpu.wait_smem_to_gmem(0)

  def visit(self, wg, q, acc):
    """Sum of the weighted values, greatest scores and sums of the weights."""
    plan = self.plan
    vector = lambda x: plgpu.layout_cast(
      jnp.full((hopper.ROWS,), x, jnp.float32), _ROWS
    )
    slot_of = lambda tile: lax.rem(tile - self.first, jnp.int32(plan.stages))
    shape = plgpu.ACC((hopper.ROWS, plan.block_kv))

    def scores_of_first(s_ref):
      plgpu.barrier_wait(self.k_full.at[0])
      plgpu.barrier_wait(self.turn.at[wg])
      plgpu.wgmma(s_ref, q, self.k.at[0].T)
      self.pass_on(wg, self.first)
      return s_ref[...]

    def step(tile, carry, mask):
      p, m, l = carry
      slot, before = slot_of(tile), slot_of(tile - 1)
      plgpu.barrier_wait(self.k_full.at[slot])
      plgpu.barrier_wait(self.v_full.at[before])
      plgpu.barrier_wait(self.turn.at[wg])

      def products(s_ref):
        plgpu.wgmma(s_ref, q, self.k.at[slot].T)
        acc.add(p, self.v.at[before])
        self.pass_on(wg, tile)
        return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

      s = pl.run_scoped(products, shape)
      plgpu.barrier_arrive(self.k_free.at[slot])
      s = self.capped(s)
      s = self.masked(wg, tile, s) if mask else s
      weights, m, l, alpha = self.softmax(s, m, l)
      # The registers of the old weights are free when their product is there.
      out, weights = lax.optimization_barrier((acc.read(), weights))
      plgpu.barrier_arrive(self.v_free.at[before])
      acc.write(out * _along_columns(alpha, out.shape))
      return weights.astype(plan.dtype), m, l

    s = pl.run_scoped(scores_of_first, shape)
    plgpu.barrier_arrive(self.k_free.at[0])
    s = self.masked(wg, self.first, self.capped(s))
    weights, m, l, _ = self.softmax(s, vector(NO_KEYS), vector(0.0))
    masked = lambda tile, carry: step(tile, carry, True)
    whole = lambda tile, carry: step(tile, carry, False)
    begin = jnp.maximum(self.whole, self.first + 1)
    middle = jnp.maximum(self.whole_end, begin)
    carry = weights.astype(plan.dtype), m, l
    carry = lax.fori_loop(self.first + 1, begin, masked, carry)
    carry = lax.fori_loop(begin, middle, whole, carry)
    p, m, l = lax.fori_loop(middle, self.end, masked, carry)
    last = slot_of(self.end - 1)
    plgpu.barrier_wait(self.v_full.at[last])
    acc.add(p, self.v.at[last])
    return acc.read(), m, l

  def pass_on(self, wg, tile):
    """Lets the next warpgroup issue, if it still has to."""
    wgs = self.plan.warpgroups

    @pl.when((wg < wgs - 1) | (tile < self.end - 1))
    def _():
      following = lax.rem(wg + 1, jnp.int32(wgs))
      plgpu.barrier_arrive(self.turn.at[following])

  def masked(self, wg, tile, s):
    """The scores, minus infinity where a query does not see a key."""
    ins, plan = self.ins, self.plan
    row0 = self.block * plan.block_q + wg * hopper.ROWS
    column0 = tile * plan.block_kv

    def of_rows(name):
      x = ins[name]
      at = (0 if x.shape[0] == 1 else self.row, pl.ds(row0, hopper.ROWS))
      x = hopper.load(x, at, _ROWS)
      return _along_columns(x, s.shape)

    def of_columns(name):
      x = ins[name]
      at = (0 if x.shape[0] == 1 else self.row, pl.ds(column0, plan.block_kv))
      x = hopper.load(x, at, _COLUMNS)
      return lax.broadcast_in_dim(x, s.shape, (1,))

    if 'q_positions' in ins:
      behind = of_rows('q_positions') - of_columns('kv_positions')
    else:
      iota = lambda dim: plgpu.broadcasted_iota(
        jnp.int32, s.shape, dim, layout=plgpu.Layout.WGMMA
      )
      behind = iota(0) - iota(1) + (row0 - column0)
    seen = behind >= 0
    if 'window' in ins:
      seen &= behind < ins['window'][0]
    if 'q_segments' in ins:
      seen &= of_rows('q_segments') == of_columns('kv_segments')
    return jnp.where(seen, s, -jnp.inf)

  def capped(self, s):
    """Scores whose product with `plan.slope` is the logit in base 2."""
    if self.plan.soft_cap is None:
      return s
    return jnp.tanh(s * (self.plan.scale / self.plan.soft_cap))

  def softmax(self, s, m, l):
    """Weights, new maxima and sums, and what the old ones shrink by."""
    plan = self.plan
    new = jnp.maximum(m, s.max(axis=1))
    alpha = jnp.exp2((m - new) * plan.slope)
    shift = _along_columns(new * plan.slope, s.shape)
    p = jnp.exp2(s * plan.slope - shift)
    return p, new, l * alpha + p.sum(axis=1), alpha

  def finish(self, out, m, l):
    """Output and natural log-sum-exp."""
    m = m * self.plan.slope
    if 'sinks' in self.ins:
      sink = self.ins['sinks'][self.head] * hopper.LOG2_E
      new = jnp.maximum(m, sink)
      shrink = jnp.exp2(m - new)
      l = l * shrink + jnp.exp2(sink - new)
      out = out * _along_columns(shrink, out.shape)
      m = new
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    lse = jnp.where(empty, NO_KEYS, m / hopper.LOG2_E + jnp.log(l))
    return out * _along_columns(1.0 / l, out.shape), lse


def _along_columns(x, shape):
  """A value per row, for each of its columns."""
  return lax.broadcast_in_dim(x, shape, (0,))
