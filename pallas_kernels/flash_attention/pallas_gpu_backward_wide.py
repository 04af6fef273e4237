"""The dk, dv kernel of `pallas_gpu_backward` for head dims above 128.

There the float32 sums of dk and dv of 64 keys fill the registers of two
warpgroups. One of them computes s and sums dv, the other computes dp and sums
dk, and gets p from the first through shared memory:

  s = k q^T,  p = exp(s - lse),  dv += p d_out;
  dp = v d_out^T,  ds = p * (dp - offset),  dk += ds q.

Each has two of the four matmuls of a tile, and is in the other's vector part.
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
from pallas_kernels.flash_attention.pallas_gpu_backward_dkv import copy_queries
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Inputs
from pallas_kernels.flash_attention.pallas_gpu_backward_tiles import Plan

# Tiles of p under way between the two.
_P_STAGES = 2
_SHAPE = ROWS, tiles.CHUNK


def dk_and_dv(plan: Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """Calls the kernel; returns [B, S, K * parts, H] each.

  `ranges` are of queries, for each 64 keys.
  """
  k = inputs.k
  b, s, kv_heads, h = k.shape
  heads = kv_heads * plan.parts
  shape = varying.shape((b, s, heads, h), k.dtype, k)
  kernel = hopper.kernel(
    functools.partial(_body, plan=plan),
    name='flash_attention_dkv_wide',
    out=(shape, shape),
    grid=dict(block=s // ROWS, batch=b, head=heads),
    scratch=scratch(plan, k.dtype) | tiles.stand_ins(k.dtype),
    warpgroups=tiles.WARPGROUPS,
  )
  return kernel(*inputs)


def scratch(plan: Plan, dtype: DTypeLike) -> dict[str, Any]:
  """Shared memory and barriers of a block."""
  h, stages = plan.head_dim, plan.stages
  free = plgpu.Barrier(num_arrivals=tiles.CONSUMERS, num_barriers=stages)
  return dict(
    k_smem=hopper.tile((ROWS, h), dtype),
    v_smem=hopper.tile((ROWS, h), dtype),
    kv_info_smem=plgpu.SMEM((plan.kinds, ROWS), jnp.int32),
    q_smem=hopper.tile((stages, tiles.CHUNK, h), dtype),
    do_smem=hopper.tile((stages, tiles.CHUNK, h), dtype),
    q_info_smem=plgpu.SMEM((stages, plan.q_kinds, tiles.CHUNK), jnp.int32),
    p_smem=hopper.tile((_P_STAGES, *_SHAPE), dtype),
    k_ready=plgpu.Barrier(num_arrivals=2),
    v_ready=plgpu.Barrier(),
    q_ready=plgpu.Barrier(num_barriers=stages),
    do_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    p_ready=plgpu.Barrier(num_barriers=_P_STAGES),
    q_free=free,
    do_free=free,
    p_free=plgpu.Barrier(num_barriers=_P_STAGES),
  )


def _body(*refs, plan, **smem):
  inputs, outs = Inputs(*refs[:-2]), refs[-2:]
  batch, head = jax.lax.axis_index('batch'), jax.lax.axis_index('head')
  block = jax.lax.axis_index('block')
  visits = tiles.visits(inputs, block, inputs.k.shape[1] // ROWS, batch)
  at = batch, pl.ds(block * ROWS, ROWS), head
  wg = jax.lax.axis_index('wg')

  @pl.when(wg == tiles.CONSUMERS)
  def _():
    tiles.registers(is_copying=True)
    copy_queries(plan, inputs, smem, (batch, head), visits)

  @pl.when(wg == 0)
  def _():
    tiles.registers(is_copying=False)
    _dv_kernel(plan, inputs, outs[1], smem, at, visits)

  @pl.when(wg == 1)
  def _():
    tiles.registers(is_copying=False)
    _dk_kernel(plan, inputs, outs[0], smem, at, visits)


def _dv_kernel(plan, inputs, dv_ref, smem, at, visits):
  batch, keys, head = at
  k_ref, dtype = smem['k_smem'], smem['k_smem'].dtype
  kv_head = head // plan.parts
  plgpu.copy_gmem_to_smem(
    inputs.k.at[batch, keys, kv_head], k_ref, smem['k_ready']
  )
  plgpu.copy_gmem_to_smem(
    inputs.kv_info.at[tiles.row_of(inputs.kv_info, batch), :, keys],
    smem['kv_info_smem'],
    smem['k_ready'],
  )
  plgpu.barrier_wait(smem['k_ready'])
  window = inputs.window[0]

  def step(dv_acc, number, i):
    slot = jax.lax.rem(number, plan.stages)
    p_slot = jax.lax.rem(number, _P_STAGES)
    q_info = smem['q_info_smem'].at[slot]

    def products(s_acc):
      plgpu.barrier_wait(smem['q_ready'].at[slot])
      plgpu.wgmma(s_acc, k_ref, smem['q_smem'].at[slot].T)
      return s_acc[...]

    s = pl.run_scoped(products, plgpu.ACC(_SHAPE, jnp.float32))
    plgpu.barrier_arrive(smem['q_free'].at[slot])
    plgpu.barrier_wait(smem['do_ready'].at[slot])
    p, p_slope = tiles.probabilities(
      s,
      tiles.along(tiles.as_float(q_info[tiles.LSE]), _SHAPE, 1),
      plan,
      is_whole=(i >= visits.whole) & (i < visits.end),
      masked=tiles.mask_of(
        plan,
        window,
        lambda x: q_info[tiles.SEGMENT if x else tiles.POSITION],
        lambda x: smem['kv_info_smem'][x],
        q_axis=1,
      ),
    )
    p_bf16 = p.astype(dtype)
    tiles.multiply(dv_acc, p_bf16, smem['do_smem'].at[slot], smem)

    @pl.when(number >= _P_STAGES)
    def _():
      plgpu.barrier_wait(smem['p_free'].at[p_slot])

    smem['p_smem'][p_slot] = p_slope.astype(dtype)
    plgpu.barrier_arrive(smem['p_ready'].at[p_slot])
    # Waits as `wgmma_wait(0)`, which the interpreter ignores.
    plgpu.wgmma_accumulator_load(dv_acc, wait_n=0)
    # `q_info` was read by other means than what is to overwrite it.
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem['do_free'].at[slot])

  dv = _over_queries(plan, visits, step)
  # Nobody else reads K.
  k_ref[...] = dv.astype(dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(k_ref, dv_ref.at[at])
  plgpu.wait_smem_to_gmem(0)


def _dk_kernel(plan, inputs, dk_ref, smem, at, visits):
  v_ref, dtype = smem['v_smem'], smem['v_smem'].dtype
  batch, keys, head = at
  plgpu.copy_gmem_to_smem(
    inputs.v.at[batch, keys, head // plan.parts], v_ref, smem['v_ready']
  )
  plgpu.barrier_wait(smem['v_ready'])

  def step(dk_acc, number, i):
    del i
    slot = jax.lax.rem(number, plan.stages)
    p_slot = jax.lax.rem(number, _P_STAGES)

    def products(dp_acc):
      plgpu.barrier_wait(smem['do_ready'].at[slot])
      plgpu.wgmma(dp_acc, v_ref, smem['do_smem'].at[slot].T)
      return dp_acc[...]

    dp = pl.run_scoped(products, plgpu.ACC(_SHAPE, jnp.float32))
    offset = tiles.as_float(smem['q_info_smem'][slot, tiles.OFFSET])
    dp -= tiles.along(offset, _SHAPE, 1)
    plgpu.barrier_wait(smem['p_ready'].at[p_slot])
    p = plgpu.layout_cast(smem['p_smem'][p_slot], plgpu.Layout.WGMMA)
    ds = (p.astype(jnp.float32) * dp).astype(dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem['p_free'].at[p_slot])
    plgpu.barrier_arrive(smem['do_free'].at[slot])
    plgpu.barrier_wait(smem['q_ready'].at[slot])
    tiles.multiply(dk_acc, ds, smem['q_smem'].at[slot], smem)
    plgpu.wgmma_accumulator_load(dk_acc, wait_n=0)
    plgpu.barrier_arrive(smem['q_free'].at[slot])

  dk = _over_queries(plan, visits, step)
  v_ref[...] = (dk * plan.scale).astype(dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(v_ref, dk_ref.at[at])
  plgpu.wait_smem_to_gmem(0)


def _over_queries(plan, visits, step):
  """The sum to which `step` adds in every visited tile of every head."""

  def run(acc):
    @pl.loop(0, plan.group)
    def _(g):
      @pl.loop(visits.first, visits.last)
      def _(i):
        number = g * (visits.last - visits.first) + i - visits.first
        step(acc, number, i)

    return acc[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, plan.head_dim), jnp.float32))
