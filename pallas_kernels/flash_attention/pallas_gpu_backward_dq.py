"""The dq kernel of `pallas_gpu_backward`: a block of queries, all of its keys.

Each of two warpgroups has 64 queries, with q and d_out in shared memory (q in
registers where they suffice, which spares the shared memory's bandwidth) and dq
in registers; a third one copies K and V to two rings. Three matmuls of a tile,

  s = q k^T,  dp = d_out v^T,  dq += ds k,

are issued so that the tensor cores have one while the vector units work: dp
during the exponentials, the dq of the tile before while the loop goes round.
For that ds is carried from step to step: its registers are not those that s is
about to be written to.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.common import hopper
from pallas_kernels.common import varying
from pallas_kernels.common.hopper import ROWS
from pallas_kernels.flash_attention import pallas_gpu_backward_tiles as tiles
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Inputs
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Plan

# Up to this head dim q fits in registers beside all else.
_NARROW = 128


def dq(plan: Plan, inputs: Inputs) -> jax.Array:
  """Calls the kernel; `ranges` are of keys, for each block of queries."""
  q = inputs.q
  b, t, n, _ = q.shape
  kernel = hopper.kernel(
    functools.partial(_body, plan=plan),
    name='flash_attention_dq',
    out=varying.shape(q.shape, q.dtype, q),
    grid=dict(block=t // tiles.BLOCK, batch=b, head=n),
    scratch=scratch(plan, q.dtype) | tiles.stand_ins(q.dtype),
    warpgroups=tiles.WARPGROUPS,
  )
  return kernel(*inputs)


def scratch(plan: Plan, dtype: DTypeLike) -> dict[str, Any]:
  """Shared memory and barriers of a block."""
  wgs, h, stages, v_stages = (
    tiles.CONSUMERS,
    plan.head_dim,
    plan.stages,
    plan.v_stages,
  )
  return dict(
    q_smem=hopper.tile((wgs, ROWS, h), dtype),
    do_smem=hopper.tile((wgs, ROWS, h), dtype),
    k_smem=hopper.tile((stages, tiles.CHUNK, h), dtype),
    v_smem=hopper.tile((v_stages, tiles.CHUNK, h), dtype),
    # In one piece, as each begins at a multiple of 1 KiB. Of the queries come
    # first.
    info_smem=plgpu.SMEM(
      (wgs * _q_kinds(plan) + v_stages * plan.kinds, ROWS), jnp.int32
    ),
    q_ready=plgpu.Barrier(num_arrivals=3, num_barriers=wgs),
    k_ready=plgpu.Barrier(num_barriers=stages),
    v_ready=plgpu.Barrier(num_arrivals=2, num_barriers=v_stages),
    k_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    v_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=v_stages),
  )


def _q_kinds(plan):
  """Numbers of a query in shared memory; an index is computed instead."""
  return plan.q_kinds - (not plan.by_position)


def _body(*refs, plan, **smem):
  inputs, dq_ref = Inputs(*refs[:-1]), refs[-1]
  batch, head = jax.lax.axis_index('batch'), jax.lax.axis_index('head')
  num_blocks = inputs.q.shape[1] // tiles.BLOCK
  # Of a causal row the last queries see most keys: they start first.
  block = num_blocks - 1 - jax.lax.axis_index('block')
  visits = tiles.visits(inputs, block, num_blocks, batch)
  wg = jax.lax.axis_index('wg')

  @pl.when(wg == tiles.CONSUMERS)
  def _():
    tiles.registers(is_copying=True)
    _copy_keys(plan, inputs, smem, (batch, head // plan.group), visits)

  @pl.when(wg != tiles.CONSUMERS)
  def _():
    tiles.registers(is_copying=False)
    at = batch, pl.ds(block * tiles.BLOCK + wg * ROWS, ROWS), head
    _copy_queries(plan, inputs, smem, at, wg)
    _dq_kernel(plan, inputs, dq_ref, smem, at, wg, visits)


def _copy_keys(plan, inputs, smem, at, visits):
  """K and V of the visited tiles, each as soon as there is space."""
  batch, head = at

  @pl.loop(visits.first, visits.last)
  def _(i):
    keys = pl.ds(i * tiles.CHUNK, tiles.CHUNK)
    step = i - visits.first
    slot = jax.lax.rem(step, plan.stages)

    @pl.when(step >= plan.stages)
    def _():
      plgpu.barrier_wait(smem['k_free'].at[slot])

    plgpu.copy_gmem_to_smem(
      inputs.k.at[batch, keys, head],
      smem['k_smem'].at[slot],
      smem['k_ready'].at[slot],
    )
    slot = jax.lax.rem(step, plan.v_stages)
    ready = smem['v_ready'].at[slot]

    @pl.when(step >= plan.v_stages)
    def _():
      plgpu.barrier_wait(smem['v_free'].at[slot])

    plgpu.copy_gmem_to_smem(
      inputs.v.at[batch, keys, head], smem['v_smem'].at[slot], ready
    )
    plgpu.copy_gmem_to_smem(
      inputs.kv_info.at[tiles.row_of(inputs.kv_info, batch), :, keys],
      smem['info_smem'].at[
        pl.ds(tiles.CONSUMERS * _q_kinds(plan) + slot * plan.kinds, plan.kinds)
      ],
      ready,
    )


def _copy_queries(plan, inputs, smem, at, wg):
  batch, queries, head = at
  ready = smem['q_ready'].at[wg]
  rows = _q_kinds(plan)
  kinds = pl.ds(plan.q_kinds - rows, rows)
  for source, target in (
    (inputs.q.at[at], smem['q_smem'].at[wg]),
    (inputs.d_out.at[at], smem['do_smem'].at[wg]),
    (
      inputs.q_info.at[batch, head, kinds, queries],
      smem['info_smem'].at[pl.ds(wg * rows, rows)],
    ),
  ):
    plgpu.copy_gmem_to_smem(source, target, ready)
  plgpu.barrier_wait(ready)


def _dq_kernel(plan, inputs, dq_ref, smem, at, wg, visits):
  shape = ROWS, tiles.CHUNK
  window = inputs.window[0]
  q_smem = smem['q_smem'].at[wg]
  dtype = q_smem.dtype
  q_regs = tiles.factor(q_smem, plan, _NARROW)
  do_regs = tiles.factor(smem['do_smem'].at[wg], plan, tiles.NARROWEST)
  info_smem, rows = smem['info_smem'], _q_kinds(plan)
  q_row = lambda x: info_smem[(wg + 1) * rows - plan.q_kinds + x]
  lse, offset = (
    tiles.along(tiles.as_float(q_row(x)), shape, 0)
    for x in (tiles.LSE, tiles.OFFSET)
  )

  def q_info(x):
    if x:
      return q_row(tiles.SEGMENT)
    if plan.by_position:
      return q_row(tiles.POSITION)
    layout = plgpu.Layout.WGMMA.reduce(1)
    iota = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout)
    return iota + at[1].start

  def wait_for_k(number):
    slot = jax.lax.rem(jnp.int32(number), jnp.int32(plan.stages))
    plgpu.barrier_wait(smem['k_ready'].at[slot])

  def step(dq_acc, i, ds_before):
    number = i - visits.first
    slot = jax.lax.rem(number, plan.stages)
    v_slot = jax.lax.rem(number, plan.v_stages)
    slot_before = jax.lax.rem(number + plan.stages - 1, plan.stages)
    zero = tiles.hidden_zero(number)
    k, v = smem['k_smem'].at[slot], smem['v_smem'].at[v_slot + zero]
    mine = wg + zero
    q = smem['q_smem'].at[mine] if q_regs is None else q_regs
    d_out = smem['do_smem'].at[mine] if do_regs is None else do_regs
    kv_row = tiles.CONSUMERS * rows + v_slot * plan.kinds
    mask = tiles.mask_of(
      plan, window, q_info, lambda x: info_smem[kv_row + x], q_axis=0
    )

    def masked(s, low):
      s = mask(s, low)
      # Keys' numbers were read by other means than what is to overwrite them.
      plgpu.commit_smem()
      return s

    def gradient(s_acc, dp_acc):
      # In the first step a zero times what is certainly there.
      k_before = smem['k_smem'].at[jnp.where(number == 0, slot, slot_before)]
      tiles.multiply(dq_acc, ds_before, k_before, smem)
      plgpu.wgmma(s_acc, q, k.T)
      plgpu.barrier_wait(smem['v_ready'].at[v_slot])
      plgpu.wgmma(dp_acc, d_out, v.T)
      s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)

      @pl.when(number > 0)
      def _():
        plgpu.barrier_arrive(smem['k_free'].at[slot_before])

      _, p_slope = tiles.probabilities(
        s,
        lse,
        plan,
        is_whole=(i >= visits.whole) & (i < visits.end),
        masked=masked,
      )
      p_slope = jax.lax.optimization_barrier(p_slope)

      # Between the exponentials and the wait for dp: without a branch there the
      # compiler puts the exponentials after that wait.
      @pl.when(i + 1 < visits.last)
      def _():
        wait_for_k(number + 1)

      dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
      plgpu.barrier_arrive(smem['v_free'].at[v_slot])
      return (p_slope * (dp - offset)).astype(dtype)

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(gradient, acc, acc)

  def gradients(dq_acc):
    pl.when(visits.first < visits.last)(lambda: wait_for_k(0))
    ds = plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)
    ds = jax.lax.fori_loop(
      visits.first, visits.last, functools.partial(step, dq_acc), ds
    )
    number = jnp.maximum(visits.last - visits.first - 1, 0)
    k = smem['k_smem'].at[jax.lax.rem(number, plan.stages)]
    tiles.multiply(dq_acc, ds, k, smem)
    return dq_acc[...]

  dq = pl.run_scoped(gradients, plgpu.ACC((ROWS, plan.head_dim), jnp.float32))
  # Without a visit the last product was with what happened to be in memory.
  dq = jax.lax.cond(
    visits.first < visits.last, lambda x: x, jnp.zeros_like, dq * plan.scale
  )
  q_smem[...] = dq.astype(dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[at])
  plgpu.wait_smem_to_gmem(0)
