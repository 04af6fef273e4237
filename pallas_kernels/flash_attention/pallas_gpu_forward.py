"""Body of the flash_attention forward for Hopper GPUs.

An SM works on one block of queries after the other. A few warpgroups hold 64
query rows of one head in each; one more warpgroup only asks for tiles of K and
V, which arrive in a ring of buffers, also for the next block. The
product with the keys of a tile is issued together with the product of the tile
before with its values, so that the softmax of the one runs beside the other
(Shah et al., "FlashAttention-3", https://arxiv.org/abs/2407.08608, algorithm
2); and the warpgroups take turns at issuing them, so that one's softmax runs
beside the products of another (section 3.1).
"""

import dataclasses
import functools
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
    num_workers: Blocks of the grid at the most: SMs.
    own_out: Whether there is room for results beside the queries.
    scale: Factor on the logits.
    soft_cap: Of the logits, or `None`.
    dtype: Of q, k and v, and of the weights of v.
    out_dtype: Of the result.
    has: Names of the inputs that are there, of `INPUTS`.
  """

  warpgroups: int
  block_kv: int
  stages: int
  num_workers: int
  own_out: bool
  scale: float
  soft_cap: float | None
  dtype: DTypeLike
  out_dtype: DTypeLike
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

  @property
  def is_8bit(self) -> bool:
    """Whether products are of 8-bit floats.

    Their second factor must be contiguous along the keys: v comes transposed.
    Weights go through shared memory, as registers hold them in another order.
    """
    return jnp.dtype(self.dtype).itemsize == 1

  @property
  def exponent(self) -> int:
    """Weights are multiplied with 2 to this; the greatest is a 256."""
    return 8 if self.is_8bit else 0


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
    inputs: q [B,T,N,H], k and v [B,S,K,H] of whole tiles, H one of WGMMA's, and
      v [B,K,H,S] if 8-bit;
      ranges int32 [B or 1, blocks, 4] flattened: the first tile to visit, the
      first and the end of those without a mask, the end; window int32 [1];
      positions and segments int32 [B or 1, T or S]; sinks float32 [N].

  Returns:
    Output [B,T,N,H] and float32 log-sum-exp [B,N,T].
  """
  q = inputs['q']
  b, t, n, h = q.shape
  num_items = b * n * (t // plan.block_q)
  wgs, stages = plan.warpgroups, plan.stages
  tile = lambda *shape: hopper.tile(shape, plan.dtype)
  full = plgpu.Barrier(num_barriers=stages)
  free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
  one_each = plgpu.Barrier(num_barriers=wgs)
  v_shape = (h, plan.block_kv) if plan.is_8bit else (plan.block_kv, h)
  scratch = dict(
    q=tile(wgs, hopper.ROWS, h),
    k=tile(stages, plan.block_kv, h),
    v=tile(stages, *v_shape),
    lse_smem=plgpu.SMEM((wgs, hopper.ROWS), jnp.float32),
    q_full=one_each,
    k_full=full,
    v_full=full,
    k_free=free,
    v_free=free,
    turn=one_each,
  )
  if plan.is_8bit:
    scratch['p'] = tile(wgs, hopper.ROWS, plan.block_kv)
  if plan.own_out:
    scratch['out_smem'] = hopper.tile((wgs, hopper.ROWS, h), plan.out_dtype)
  names = tuple(scratch)

  def body(*refs):
    ins = dict(zip(plan.has, refs, strict=False))
    out, lse, *refs = refs[len(plan.has) :]
    num_named = len(names)
    buffers = dict(zip(names, refs[:num_named], strict=True))
    _Worker(plan, ins, out, lse, buffers, refs[num_named:]).run()

  return hopper.kernel(
    body,
    name='flash_attention_forward',
    out=(
      jax.ShapeDtypeStruct(q.shape, plan.out_dtype),
      jax.ShapeDtypeStruct((b, n, t), jnp.float32),
    ),
    grid=dict(worker=min(plan.num_workers, num_items)),
    scratch=[*scratch.values(), *hopper.stand_ins(wgs, (hopper.ROWS, h))],
    warpgroups=wgs + 1,
  )(*(inputs[name] for name in plan.has))


@dataclasses.dataclass(frozen=True)
class _Item:
  """A block of queries of one head.

  Attributes:
    row: Of the batch.
    head: Of the queries.
    block: Of the row's.
    first: First tile to visit.
    whole: First without a mask.
    whole_end: After the last of these.
    end: After the last tile.
  """

  row: Any
  head: Any
  block: Any
  first: Any
  whole: Any
  whole_end: Any
  end: Any


class _Worker:
  """An SM that works on one item after the other."""

  def __init__(self, plan, ins, out, lse, buffers, stand_ins):
    self.plan, self.ins, self.out, self.lse = plan, ins, out, lse
    vars(self).update(buffers)
    self.stand_ins = stand_ins
    self.num_workers = lax.axis_size('worker')
    b, t, n, _ = ins['q'].shape
    self.num_blocks = t // plan.block_q
    self.num_items = b * n * self.num_blocks

  def items(self, do):
    """Calls `do(item, index, count)`; `count` tiles were visited before.

    The last blocks of causal attention are the longest: they go first. Heads
    of a group read the same K and V at about the same time.
    """

    def visit(step, count):
      index = lax.axis_index('worker') + step * self.num_workers
      item = self.item(index)
      do(item, index, count)
      return count + item.end - item.first

    me = lax.axis_index('worker')
    mine = lax.div(
      self.num_items - 1 - me + self.num_workers, jnp.int32(self.num_workers)
    )
    lax.fori_loop(0, mine, visit, jnp.int32(0))

  def item(self, index):
    """The item of a number."""
    b, _, n, _ = self.ins['q'].shape
    block = self.num_blocks - 1 - lax.div(index, jnp.int32(b * n))
    rest = lax.rem(index, jnp.int32(b * n))
    row, head = lax.div(rest, jnp.int32(n)), lax.rem(rest, jnp.int32(n))
    ranges = self.ins['ranges']
    shared = ranges.shape[0] == 4 * self.num_blocks
    at = 4 * (block + (0 if shared else row * self.num_blocks))
    return _Item(row, head, block, *(ranges[at + i] for i in range(4)))

  def run(self):
    """Each warpgroup does its part."""
    wg = lax.axis_index('wg')
    wgs = self.plan.warpgroups

    @pl.when(wg < wgs)
    def _():
      plgpu.set_max_registers(_CONSUMER_REGISTERS[wgs], action='increase')
      self.fetch_q(wg, self.item(lax.axis_index('worker')))
      self.items(functools.partial(self.compute, wg))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == wgs)
    def _():
      plgpu.set_max_registers(_PRODUCER_REGISTERS[wgs], action='decrease')
      self.items(self.fetch)

  def slot(self, item, tile, count):
    """Buffer of a tile."""
    return lax.rem(count + tile - item.first, jnp.int32(self.plan.stages))

  def rows(self, wg, item):
    """Queries of a warpgroup."""
    start = item.block * self.plan.block_q + wg * hopper.ROWS
    return pl.ds(start, hopper.ROWS)

  def fetch_q(self, wg, item):
    """Asks for the queries of a warpgroup."""
    source = self.ins['q'].at[item.row, self.rows(wg, item), item.head]
    plgpu.copy_gmem_to_smem(source, self.q.at[wg], self.q_full.at[wg])

  def fetch_next_q(self, wg, index):
    """Asks for those of the next item, if there is one."""
    following = index + self.num_workers

    @pl.when(following < self.num_items)
    def _():
      self.fetch_q(wg, self.item(following))

  def fetch(self, item, index, count):
    """Asks for all tiles of an item, as buffers become free."""
    del index
    plan, ins = self.plan, self.ins
    group = ins['q'].shape[2] // ins['k'].shape[2]
    kv_head = lax.div(item.head, jnp.int32(group))

    @pl.loop(item.first, item.end)
    def _(tile):
      slot = self.slot(item, tile, count)
      keys = pl.ds(tile * plan.block_kv, plan.block_kv)
      for name, smem, full, free in (
        ('k', self.k, self.k_full, self.k_free),
        ('v', self.v, self.v_full, self.v_free),
      ):

        @pl.when(count + tile - item.first >= plan.stages)
        def _():
          plgpu.barrier_wait(free.at[slot])

        if name == 'v' and plan.is_8bit:
          source = ins[name].at[item.row, kv_head, :, keys]
        else:
          source = ins[name].at[item.row, keys, kv_head]
        plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

  def compute(self, wg, item, index, count):
    """Attention of 64 rows."""
    plan = self.plan
    q = self.q.at[wg]
    # The first turn is the first warpgroup's.
    pl.when(wg == plan.warpgroups - 1)(
      lambda: plgpu.barrier_arrive(self.turn.at[0])
    )
    plgpu.barrier_wait(self.q_full.at[wg])
    out, m, l = hopper.with_accumulator(
      functools.partial(self.visit, wg, item, index, count),
      (hopper.ROWS, q.shape[-1]),
      *(ref.at[wg] for ref in self.stand_ins),
    )
    out, lse = self.finish(item, out, m, l)
    # The last item's is written from there.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem = self.out_smem.at[wg] if plan.own_out else q
    out_smem[...] = out.astype(plan.out_dtype)
    self.lse_smem.at[wg][...] = lse
    plgpu.commit_smem()
    rows = self.rows(wg, item)
    plgpu.copy_smem_to_gmem(out_smem, self.out.at[item.row, rows, item.head])
    plgpu.copy_smem_to_gmem(
      self.lse_smem.at[wg], self.lse.at[item.row, item.head, rows]
    )
    if not plan.own_out:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      self.fetch_next_q(wg, index)

  def visit(self, wg, item, index, count, acc):
    """Sum of the weighted values, greatest scores and sums of the weights."""
    plan = self.plan
    q = self.q.at[wg]
    shape = plgpu.ACC((hopper.ROWS, plan.block_kv))
    slot_of = lambda tile: self.slot(item, tile, count)

    def step(tile, carry, mask):
      p, m, l = carry
      slot, before = slot_of(tile), slot_of(tile - 1)
      plgpu.barrier_wait(self.k_full.at[slot])
      plgpu.barrier_wait(self.v_full.at[before])
      plgpu.barrier_wait(self.turn.at[wg])

      def products(s_ref):
        plgpu.wgmma(s_ref, q, self.k.at[slot].T)
        self.add_values(wg, acc, p, before)
        self.pass_on(wg, item, tile)
        return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

      s = pl.run_scoped(products, shape)
      plgpu.barrier_arrive(self.k_free.at[slot])
      s = self.capped(s)
      s = self.masked(wg, item, tile, s) if mask else s
      weights, m, l, alpha = self.softmax(s, m, l)
      # The registers of the old weights are free when their product is there.
      out, weights = lax.optimization_barrier((acc.read(), weights))
      plgpu.barrier_arrive(self.v_free.at[before])
      acc.write(out * _along_columns(alpha, out.shape))
      return self.as_factor(wg, weights), m, l

    masked = lambda tile, carry: step(tile, carry, True)
    whole = lambda tile, carry: step(tile, carry, False)
    begin = jnp.maximum(item.whole, item.first + 1)
    middle = jnp.maximum(item.whole_end, begin)
    carry = self.visit_first(wg, item, slot_of(item.first))
    carry = lax.fori_loop(item.first + 1, begin, masked, carry)
    carry = lax.fori_loop(begin, middle, whole, carry)
    p, m, l = lax.fori_loop(middle, item.end, masked, carry)
    last = slot_of(item.end - 1)
    plgpu.barrier_wait(self.v_full.at[last])
    self.add_values(wg, acc, p, last)
    if plan.own_out:
      self.fetch_next_q(wg, index)
    out = acc.read()
    plgpu.barrier_arrive(self.v_free.at[last])
    return out, m, l

  def visit_first(self, wg, item, slot):
    """Weights of the first tile, their maxima and sums."""

    def products(s_ref):
      plgpu.barrier_wait(self.k_full.at[slot])
      plgpu.barrier_wait(self.turn.at[wg])
      plgpu.wgmma(s_ref, self.q.at[wg], self.k.at[slot].T)
      self.pass_on(wg, item, item.first)
      return s_ref[...]

    s = pl.run_scoped(products, plgpu.ACC((hopper.ROWS, self.plan.block_kv)))
    plgpu.barrier_arrive(self.k_free.at[slot])
    s = self.masked(wg, item, item.first, self.capped(s))
    all_rows = lambda x: plgpu.layout_cast(
      jnp.full((hopper.ROWS,), x, jnp.float32), _ROWS
    )
    weights, m, l, _ = self.softmax(s, all_rows(NO_KEYS), all_rows(0.0))
    return self.as_factor(wg, weights), m, l

  def as_factor(self, wg, weights):
    """The weights as a product takes them: in registers, or `()`."""
    weights = weights.astype(self.plan.dtype)
    if not self.plan.is_8bit:
      return weights
    self.p.at[wg][...] = weights
    plgpu.commit_smem()
    return ()

  def add_values(self, wg, acc, p, slot):
    """Issues the product of the weights and a tile of values."""
    if self.plan.is_8bit:
      acc.add(self.p.at[wg], self.v.at[slot].T)
    else:
      acc.add(p, self.v.at[slot])

  def pass_on(self, wg, item, tile):
    """Lets the next warpgroup issue, if it still has to."""
    wgs = self.plan.warpgroups

    @pl.when((wg < wgs - 1) | (tile < item.end - 1))
    def _():
      following = lax.rem(wg + 1, jnp.int32(wgs))
      plgpu.barrier_arrive(self.turn.at[following])

  def masked(self, wg, item, tile, s):
    """The scores, minus infinity where a query does not see a key."""
    ins, plan = self.ins, self.plan
    row0 = item.block * plan.block_q + wg * hopper.ROWS
    column0 = tile * plan.block_kv

    def of_rows(name):
      x = ins[name]
      at = (0 if x.shape[0] == 1 else item.row, pl.ds(row0, hopper.ROWS))
      x = hopper.load(x, at, _ROWS)
      return _along_columns(x, s.shape)

    def of_columns(name):
      x = ins[name]
      at = (0 if x.shape[0] == 1 else item.row, pl.ds(column0, plan.block_kv))
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
    shift = _along_columns(new * plan.slope - plan.exponent, s.shape)
    p = jnp.exp2(s * plan.slope - shift)
    return p, new, l * alpha + p.sum(axis=1), alpha

  def finish(self, item, out, m, l):
    """Output and natural log-sum-exp."""
    # The sums have a factor of 2 ** exponent.
    m = m * self.plan.slope - self.plan.exponent
    if 'sinks' in self.ins:
      sink = self.ins['sinks'][item.head] * hopper.LOG2_E
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
