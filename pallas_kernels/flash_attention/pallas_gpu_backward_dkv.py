"""The dk, dv kernel of `pallas_gpu_backward`: keys, all queries that see them.

Each of two warpgroups has 64 keys, with K and V in shared memory and dk and dv
in registers; a third one copies q and d_out of every head of the group to two
rings. Scores are transposed, keys in rows, so that p and ds are what dv and dk
multiply, from registers. Four matmuls of a tile,

  s = k q^T,  dp = v d_out^T,  dv += p d_out,  dk += ds q,

are issued so that the tensor cores have some while the vector units work: the
dk of the tile before and dp during the exponentials, dv during ds. For that ds
is carried from step to step, see `pallas_gpu_backward_dq`.
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


def dk_and_dv(plan: Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """Calls the kernel; returns [B, S, K * parts, H] each.

  `ranges` are of queries, for each block of keys.
  """
  k = inputs.k
  b, s, kv_heads, h = k.shape
  heads = kv_heads * plan.parts
  shape = varying.shape((b, s, heads, h), k.dtype, k)
  kernel = hopper.kernel(
    functools.partial(_body, plan=plan),
    name='flash_attention_dkv',
    out=(shape, shape),
    # Of a causal row the first keys are seen by most queries: they start first.
    grid=dict(block=s // tiles.BLOCK, batch=b, head=heads),
    scratch=scratch(plan, k.dtype) | tiles.stand_ins(k.dtype),
    warpgroups=tiles.WARPGROUPS,
  )
  return kernel(*inputs)


def scratch(plan: Plan, dtype: DTypeLike) -> dict[str, Any]:
  """Shared memory and barriers of a block."""
  wgs, h, stages = tiles.CONSUMERS, plan.head_dim, plan.stages
  free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
  return dict(
    k_smem=hopper.tile((wgs, ROWS, h), dtype),
    v_smem=hopper.tile((wgs, ROWS, h), dtype),
    kv_info_smem=plgpu.SMEM((wgs, plan.kinds, ROWS), jnp.int32),
    q_smem=hopper.tile((stages, tiles.CHUNK, h), dtype),
    do_smem=hopper.tile((stages, tiles.CHUNK, h), dtype),
    q_info_smem=plgpu.SMEM((stages, plan.q_kinds, tiles.CHUNK), jnp.int32),
    kv_ready=plgpu.Barrier(num_arrivals=3, num_barriers=wgs),
    q_ready=plgpu.Barrier(num_barriers=stages),
    do_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    q_free=free,
    do_free=free,
  )


def _body(*refs, plan, **smem):
  inputs, outs = Inputs(*refs[:-2]), refs[-2:]
  batch, head = jax.lax.axis_index('batch'), jax.lax.axis_index('head')
  block = jax.lax.axis_index('block')
  num_blocks = inputs.k.shape[1] // tiles.BLOCK
  visits = tiles.visits(inputs, block, num_blocks, batch)
  wg = jax.lax.axis_index('wg')

  @pl.when(wg == tiles.CONSUMERS)
  def _():
    tiles.registers(is_copying=True)
    copy_queries(plan, inputs, smem, (batch, head), visits)

  @pl.when(wg != tiles.CONSUMERS)
  def _():
    tiles.registers(is_copying=False)
    at = batch, pl.ds(block * tiles.BLOCK + wg * ROWS, ROWS), head
    _copy_keys(plan, inputs, smem, at, wg)
    _sums_kernel(plan, inputs, outs, smem, at, wg, visits)


def copy_queries(plan, inputs, smem, at, visits):
  """q and d_out of the visited tiles, each as soon as there is space."""
  batch, head = at

  def copy(step, q_head, i):
    queries = pl.ds(i * tiles.CHUNK, tiles.CHUNK)
    slot = jax.lax.rem(step, plan.stages)

    @pl.when(step >= plan.stages)
    def _():
      plgpu.barrier_wait(smem['q_free'].at[slot])

    plgpu.copy_gmem_to_smem(
      inputs.q.at[batch, queries, q_head],
      smem['q_smem'].at[slot],
      smem['q_ready'].at[slot],
    )

    @pl.when(step >= plan.stages)
    def _():
      plgpu.barrier_wait(smem['do_free'].at[slot])

    for source, name in (
      (inputs.d_out.at[batch, queries, q_head], 'do_smem'),
      (inputs.q_info.at[batch, q_head, :, queries], 'q_info_smem'),
    ):
      plgpu.copy_gmem_to_smem(
        source, smem[name].at[slot], smem['do_ready'].at[slot]
      )

  @pl.loop(0, plan.group)
  def _(g):
    @pl.loop(visits.first, visits.last)
    def _(i):
      step = g * (visits.last - visits.first) + i - visits.first
      copy(step, head * plan.group + g, i)


def _copy_keys(plan, inputs, smem, at, wg):
  batch, keys, head = at
  at = batch, keys, head // plan.parts
  ready = smem['kv_ready'].at[wg]
  for source, name in (
    (inputs.k.at[at], 'k_smem'),
    (inputs.v.at[at], 'v_smem'),
    (
      inputs.kv_info.at[tiles.row_of(inputs.kv_info, batch), :, keys],
      'kv_info_smem',
    ),
  ):
    plgpu.copy_gmem_to_smem(source, smem[name].at[wg], ready)
  plgpu.barrier_wait(ready)


def _factors(smem, kv_regs, at):
  """K and V, in registers or in shared memory."""
  return [
    smem[name].at[at] if regs is None else regs
    for name, regs in zip(('k_smem', 'v_smem'), kv_regs, strict=True)
  ]


def _sums_kernel(plan, inputs, outs, smem, at, wg, visits):
  shape = ROWS, tiles.CHUNK
  window = inputs.window[0]
  dtype = smem['k_smem'].dtype
  kv_regs = [
    tiles.factor(smem[name].at[wg], plan, tiles.NARROWEST)
    for name in ('k_smem', 'v_smem')
  ]

  num_visits = visits.last - visits.first

  def wait_for_q(number):
    slot = jax.lax.rem(jnp.int32(number), jnp.int32(plan.stages))
    plgpu.barrier_wait(smem['q_ready'].at[slot])

  def step(sums, number, i, ds_before):
    dk_acc, dv_acc = sums
    slot = jax.lax.rem(number, plan.stages)
    slot_before = jax.lax.rem(number + plan.stages - 1, plan.stages)
    q, d_out = smem['q_smem'].at[slot], smem['do_smem'].at[slot]
    q_info = smem['q_info_smem'].at[slot]
    k, v = _factors(smem, kv_regs, wg + tiles.hidden_zero(number))
    mask = tiles.mask_of(
      plan,
      window,
      lambda x: q_info[tiles.SEGMENT if x else tiles.POSITION],
      lambda x: smem['kv_info_smem'][wg, x],
      q_axis=1,
    )

    def gradient(s_acc, dp_acc):
      # In the first step a zero times what is certainly there.
      q_before = smem['q_smem'].at[jnp.where(number == 0, slot, slot_before)]
      tiles.multiply(dk_acc, ds_before, q_before, smem)
      plgpu.wgmma(s_acc, k, q.T)
      plgpu.barrier_wait(smem['do_ready'].at[slot])
      plgpu.wgmma(dp_acc, v, d_out.T)
      s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)

      @pl.when(number > 0)
      def _():
        plgpu.barrier_arrive(smem['q_free'].at[slot_before])

      p, p_slope = tiles.probabilities(
        s,
        tiles.along(tiles.as_float(q_info[tiles.LSE]), shape, 1),
        plan,
        is_whole=(i >= visits.whole) & (i < visits.end),
        masked=mask,
      )
      tiles.multiply(dv_acc, p.astype(dtype), d_out, smem)
      dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
      ds = p_slope * (
        dp - tiles.along(tiles.as_float(q_info[tiles.OFFSET]), shape, 1)
      )
      ds = jax.lax.optimization_barrier(ds.astype(dtype))

      # Between ds and the wait for dv: without a branch there the compiler puts
      # part of ds after that wait.
      @pl.when(number + 1 < plan.group * num_visits)
      def _():
        wait_for_q(number + 1)

      # Waits as `wgmma_wait(0)`, which the interpreter ignores.
      plgpu.wgmma_accumulator_load(dv_acc, wait_n=0)
      # `q_info` was read by other means than what is to overwrite it.
      plgpu.commit_smem()
      plgpu.barrier_arrive(smem['do_free'].at[slot])
      return ds

    acc = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(gradient, acc, acc)

  def gradients(*sums):
    pl.when(num_visits > 0)(lambda: wait_for_q(0))

    def of_head(g, ds):
      def of_block(i, ds):
        return step(sums, g * num_visits + i - visits.first, i, ds)

      return jax.lax.fori_loop(visits.first, visits.last, of_block, ds)

    ds = plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)
    ds = jax.lax.fori_loop(0, plan.group, of_head, ds)
    number = jnp.maximum(plan.group * num_visits - 1, 0)
    q = smem['q_smem'].at[jax.lax.rem(number, plan.stages)]
    tiles.multiply(sums[0], ds, q, smem)
    return sums[0][...], sums[1][...]

  acc = plgpu.ACC((ROWS, plan.head_dim), jnp.float32)
  dk, dv = pl.run_scoped(gradients, acc, acc)
  # Without a visit the last product was with what happened to be in memory.
  dk = jax.lax.cond(
    num_visits > 0, lambda x: x, jnp.zeros_like, dk * plan.scale
  )
  k, v = smem['k_smem'].at[wg], smem['v_smem'].at[wg]
  k[...] = dk.astype(dtype)
  v[...] = dv.astype(dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(k, outs[0].at[at])
  plgpu.copy_smem_to_gmem(v, outs[1].at[at])
  plgpu.wait_smem_to_gmem(0)
