"""What `tpu_kernels` times: kernels at the shapes of published comparisons.

A row names one piece of work; its contenders do the same work with the same
arrays, each in the layout it wants. Upstream's kernels are those that come with
JAX, at the block sizes that its own tuning guides give.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import dispatch

# Operands stay in HBM: the schedule has no timing for the CMEM of a v4.
FLAGS = ('--xla_tpu_cmem_memory_space_assignment=false',)
_BF16 = jnp.bfloat16
_HEADS, _HEAD_DIM = 8, 128
_QUERY_HEADS, _KV_HEADS = 32, 8
_VMEM = {'v4': 14, 'v5e': 100, 'v5p': 56, 'v6e': 100, 'tpu7x': 56}


@dataclasses.dataclass(frozen=True)
class Row:
  """One piece of work.

  Attributes:
    flops: Useful ones.
    hbm_bytes: That must move at least.
    contenders: Name to `chip -> (function, arguments)`.
    kernels: Which of a program's Pallas kernels do this work.
  """

  flops: float
  hbm_bytes: float
  contenders: dict[str, Callable[[str], tuple[Callable[..., Any], tuple]]]
  kernels: Callable[[str], bool] = lambda name: True


def _abstract(*shape, dtype=_BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _ours(op, *args, function=None, **kwargs):
  """Our kernel, as a contender that ignores the chip: it asks itself."""
  return lambda chip: (
    functools.partial(dispatch.load(op, 'pallas_tpu', function), **kwargs),
    args,
  )


def _xla(op, *args, function=None, **kwargs):
  return lambda chip: (
    functools.partial(dispatch.load(op, 'xla', function), **kwargs),
    args,
  )


def _splash(length, block, compute, backward=False):
  def build(chip):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_mask as masks,
    )

    def forward(q, k, v):
      causal = masks.CausalMask((length, length))
      return kernel.make_splash_mha(
        mask=masks.MultiHeadMask([causal] * _HEADS),
        block_sizes=kernel.BlockSizes(
          block_q=block,
          block_kv=block,
          block_kv_compute=compute,
          block_q_dkv=block,
          block_kv_dkv=block,
          block_kv_dkv_compute=compute,
          use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
      )(q, k, v)

    return _with_backward(
      forward, _abstract(_HEADS, length, _HEAD_DIM), backward
    )

  return build


def _flash(length, block, backward=False):
  def build(chip):
    from jax.experimental.pallas.ops.tpu import flash_attention as upstream

    sizes = upstream.BlockSizes(
      block_q=block,
      block_k_major=block,
      block_k=block,
      block_b=1,
      block_q_major_dkv=block,
      block_k_major_dkv=block,
      block_k_dkv=block,
      block_q_dkv=block,
      block_k_major_dq=block,
      block_k_dq=block,
      block_q_dq=block,
    )
    forward = functools.partial(
      upstream.flash_attention, causal=True, block_sizes=sizes
    )
    return _with_backward(
      forward, _abstract(1, _HEADS, length, _HEAD_DIM), backward
    )

  return build


def _with_backward(forward, array, backward):
  if not backward:
    return forward, (array,) * 3
  vjp = lambda q, k, v, d_out: jax.vjp(forward, q, k, v)[1](d_out)
  return vjp, (array,) * 4


def _attention(length):
  a = _abstract(1, length, _HEADS, _HEAD_DIM)
  return Row(
    flops=2.0 * _HEADS * length**2 * _HEAD_DIM,
    hbm_bytes=4 * a.size * 2,
    contenders={
      'ours': _ours(
        'flash_attention',
        *(a, a, a, None, None, None, None, None),
        function='flash_attention_forward',
        scale=_HEAD_DIM**-0.5,
        soft_cap=None,
      ),
      'splash 1024': _splash(length, 1024, 1024),
      'splash 1024/512': _splash(length, 1024, 512),
      'flash 1024': _flash(length, 1024),
      'flash 512': _flash(length, 512),
    },
  )


def _attention_backward(length):
  a = _abstract(1, length, _HEADS, _HEAD_DIM)
  lse = _abstract(1, _HEADS, length, dtype=jnp.float32)
  return Row(
    flops=5.0 * _HEADS * length**2 * _HEAD_DIM,
    hbm_bytes=8 * a.size * 2,
    contenders={
      'ours': _ours(
        'flash_attention',
        *(a, a, a, None, None, None, None, None, a, lse, a, None),
        function='flash_attention_backward',
        scale=_HEAD_DIM**-0.5,
        soft_cap=None,
      ),
      'splash 1024': _splash(length, 1024, 1024, backward=True),
      'splash 1024/512': _splash(length, 1024, 512, backward=True),
      'flash 1024': _flash(length, 1024, backward=True),
      'flash 512': _flash(length, 512, backward=True),
    },
    kernels=lambda name: any(
      part in name for part in ('backward', 'bwd', 'dkv', 'dq')
    ),
  )


def _paged(query_lens, kv_lens, page_size):
  """Ragged paged attention; pages scattered over the pool."""
  pages = [-(-n // page_size) for n in kv_lens]
  order = np.random.default_rng(0).permutation(sum(pages)).astype(np.int32)
  table = np.zeros((len(pages), max(pages)), np.int32)
  for i, row in enumerate(np.split(order, np.cumsum(pages)[:-1])):
    table[i, : len(row)] = row
  start = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
  kv_len = np.array(kv_lens, np.int32)
  # Query i of m sees n - m + 1 + i keys.
  pairs = sum(
    m * (n - m) + m * (m + 1) / 2
    for m, n in zip(query_lens, kv_lens, strict=True)
  )
  q = _abstract(int(start[-1]), _QUERY_HEADS, _HEAD_DIM)
  pool = _abstract(1, sum(pages), _KV_HEADS, page_size, _HEAD_DIM)

  def upstream(chip):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
      ragged_paged_attention,
    )

    f = functools.partial(
      ragged_paged_attention,
      sm_scale=_HEAD_DIM**-0.5,
      vmem_limit_bytes=_VMEM[chip] << 20,
    )
    both = _abstract(sum(pages), page_size, 2 * _KV_HEADS, _HEAD_DIM)
    count = np.array([len(pages)], np.int32)
    return f, (q, both, kv_len, table, start, count)

  layer = np.int32(0)
  return Row(
    flops=4.0 * _QUERY_HEADS * _HEAD_DIM * pairs,
    hbm_bytes=2.0 * (sum(kv_lens) * _KV_HEADS * 2 * _HEAD_DIM + 2 * q.size),
    contenders={
      'ours': _ours(
        'ragged_paged_attention',
        *(q, pool, pool, layer, start, kv_len, table),
        *(None,) * 5,
        scale=_HEAD_DIM**-0.5,
        soft_cap=None,
      ),
      'ragged paged attention': upstream,
    },
  )


def _grouped(m, k, n, sizes):
  sizes = np.array(sizes, np.int32)
  lhs, rhs = _abstract(m, k), _abstract(len(sizes), k, n)

  def megablox(tiling):
    def build(chip):
      from jax.experimental.pallas.ops.tpu import megablox

      f = functools.partial(
        megablox.gmm, preferred_element_type=_BF16, tiling=tiling
      )
      return f, (lhs, rhs, sizes)

    return build

  return Row(
    flops=2.0 * int(sizes.sum()) * k * n,
    hbm_bytes=2.0 * (lhs.size + rhs.size + m * n),
    contenders={
      'ours': _ours('grouped_matmul', lhs, rhs, sizes),
      'megablox 512x1024x1024': megablox((512, 1024, 1024)),
      'megablox 512x2048x1024': megablox((512, 2048, 1024)),
    },
  )


def _shared(op, case, *, flops=0.0, results=0, function=None):
  """A case that the tests compile too; reads its arrays, only ours is timed."""
  made = importlib.import_module(f'pallas_kernels.{op}.cases').TPU[case]()
  arrays = [x for x in made['args'] if x is not None]
  read = sum(x.size * x.dtype.itemsize for x in arrays)
  ours = _ours(op, *made['args'], function=function, **made['kwargs'])
  return Row(flops=flops, hbm_bytes=read + results, contenders={'ours': ours})


def _quantized(case, m=32, k=4096, n=14336):
  return _shared(
    'quantized_matmul', case, flops=2.0 * m * k * n, results=2 * m * n
  )


def _loss(tokens=4096, width=4096, vocab=128256):
  """Logits and the gradients of both factors: three products."""
  return _shared(
    'linear_cross_entropy',
    'llama3_8b',
    flops=3 * 2.0 * tokens * width * vocab,
    results=2 * width * (tokens + vocab),
    function='linear_cross_entropy_gradients',
  )


def _kv_update(tokens=64, num_kv=8, rows=16):
  """Memory is written by tiles of 16 tokens: each is read and written."""
  row = _shared('kv_update', 'decode_b64_page16')
  tile = num_kv * rows * _HEAD_DIM * 2
  return dataclasses.replace(row, hbm_bytes=2.0 * 2 * tokens * tile)


ROWS: dict[str, Callable[[], Row]] = {
  'attention forward 16384': functools.partial(_attention, 16384),
  'attention forward 4096': functools.partial(_attention, 4096),
  'attention backward 16384': functools.partial(_attention_backward, 16384),
  'paged decode 64 x 2048, page 16': functools.partial(
    _paged, (1,) * 64, (2048,) * 64, 16
  ),
  'paged decode 64 x 2048, page 128': functools.partial(
    _paged, (1,) * 64, (2048,) * 64, 128
  ),
  'paged prefill 4096, page 16': functools.partial(
    _paged, (4096,), (4096,), 16
  ),
  'paged prefill 2048, page 128': functools.partial(
    _paged, (2048,), (2048,), 128
  ),
  'paged decode 32 x 2048, page 128': functools.partial(
    _paged, (1,) * 32, (2048,) * 32, 128
  ),
  'paged decode 1 x 131072, page 128': functools.partial(
    _paged, (1,), (131072,), 128
  ),
  'paged mixed 32 + 2048, page 128': functools.partial(
    _paged, (1,) * 32 + (2048,), (2048,) * 33, 128
  ),
  'grouped matmul 8192x2048x4096, 8 experts': functools.partial(
    _grouped, 8192, 2048, 4096, (1024,) * 8
  ),
  'grouped matmul 8192x2048x4096, skewed': functools.partial(
    _grouped, 8192, 2048, 4096, (3000, 17, 0, 1031, 2500, 144, 999, 501)
  ),
  'quantized matmul 32x4096x14336, int8': functools.partial(
    _quantized, 'w8a16_decode'
  ),
  'quantized matmul 32x4096x14336, 4 bits': functools.partial(
    _quantized, 'w4a16_decode'
  ),
  'loss and gradients, 4096 tokens, 4096x128256': _loss,
  'sampling 64 x 128256': functools.partial(_shared, 'sampling', 'llama3_b64'),
  'kv update, 64 decodes, page 16': _kv_update,
}
