"""Named inputs shared by the contract test and the benchmark.

A case is `key -> dict(args, kwargs, diff)`: arrays, static arguments, and the
indices of the arrays to differentiate (none: an inference op). `TPU` has model
shapes to compile: abstract arrays, and values where they steer the kernel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def quantize(x, dtype):
  """`x [..., H]` in `dtype`, and its float32 scales `[...]`."""
  dtype = jnp.dtype(dtype)
  whole = jnp.issubdtype(dtype, jnp.integer)
  top = (jnp.iinfo if whole else jnp.finfo)(dtype).max
  scales = jnp.abs(x).max(axis=-1).astype(jnp.float32) / float(top)
  x = x / jnp.maximum(scales, 1e-30)[..., None]
  return (jnp.round(x) if whole else x).astype(dtype), scales


def tree_mask(rng, query_lens, num_tokens):
  """Words of random trees: a query sees itself and its ancestors."""
  words = np.zeros((num_tokens, -(-max(query_lens) // 32)), np.uint32)
  start = 0
  for length in query_lens:
    for i in range(length):
      row = words[start + i]
      if i:
        row[:] = words[start + rng.integers(i)]
      row[i // 32] |= np.uint32(1 << i % 32)
    start += length
  return jnp.array(words.view(np.int32))


def some_pages(table, kv_lens, page_size, which):
  """Table and positions of the pages `which [S, M]` of each sequence."""
  few = np.zeros_like(table)
  positions = np.full_like(table, np.iinfo(np.int32).max)
  for s, length in enumerate(kv_lens):
    m = np.flatnonzero(which[s])
    m = m[m * page_size < length]
    few[s, : len(m)] = table[s, m]
    positions[s, : len(m)] = m * page_size
  return jnp.asarray(few), jnp.asarray(positions)


def _part(part, table, kv_lens, page_size):
  """Every third page or so, and their positions; or all, and `None`."""
  if part is None:
    return table, None
  which = np.random.default_rng(part).integers(0, 3, table.shape) == 0
  return some_pages(table, kv_lens, page_size, which)


def _case(
  key,
  *,
  query_lens,
  kv_lens,
  num_tokens=None,
  n=4,
  k=2,
  h=16,
  page_size=4,
  pages_per_seq=8,
  layers=2,
  dtype='float32',
  window=None,
  soft_cap=None,
  sinks=False,
  pages=None,
  tree=False,
  return_lse=False,
  part=None,
):
  kq, kk, kv, kp = jax.random.split(key, 4)
  num_seqs = len(kv_lens)
  num_pages = num_seqs * pages_per_seq + 3
  pool = (layers, num_pages, k, page_size, h)
  table = jax.random.permutation(kp, num_pages)[: num_seqs * pages_per_seq]
  starts = np.concatenate([[0], np.cumsum(query_lens)])
  num_tokens = num_tokens or int(starts[-1])
  keys, values = (jax.random.normal(x, pool, dtype) for x in (kk, kv))
  k_scales = v_scales = None
  if pages is not None:
    keys, k_scales = quantize(keys, pages)
    values, v_scales = quantize(values, pages)
  table = np.asarray(table.reshape(num_seqs, pages_per_seq), np.int32)
  table, positions = _part(part, table, kv_lens, page_size)
  rng = np.random.default_rng(0)
  return dict(
    args=(
      jax.random.normal(kq, (num_tokens, n, h), dtype),
      keys,
      values,
      jnp.int32(layers - 1),
      jnp.array(starts, jnp.int32),
      jnp.array(kv_lens, jnp.int32),
      jnp.asarray(table),
      None if window is None else jnp.int32(window),
      2 * jax.random.normal(kq, (n,)) if sinks else None,
      k_scales,
      v_scales,
      tree_mask(rng, query_lens, num_tokens) if tree else None,
      positions,
    ),
    kwargs=dict(
      scale=h**-0.5,
      soft_cap=soft_cap,
      return_lse=return_lse,
    ),
    diff=(),
    valid=int(starts[-1]),
  )


_DECODE = dict(query_lens=(1, 0, 1, 1), kv_lens=(5, 0, 1, 61))
_MIXED = dict(query_lens=(1, 20, 0, 7), kv_lens=(13, 20, 0, 30))
SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'decode': dict(query_lens=(1, 1, 1), kv_lens=(5, 1, 32)),
    'decode_idle_rows': dict(query_lens=(1, 0, 1), kv_lens=(9, 0, 17)),
    'prefill': dict(query_lens=(17,), kv_lens=(17,)),
    'chunk': dict(query_lens=(9, 5), kv_lens=(25, 5)),
    'mixed': _MIXED,
    'mixed_padded': dict(**_MIXED, num_tokens=40),
    'mixed_bf16': dict(**_MIXED, dtype='bfloat16'),
    'decode_bf16': dict(
      **_DECODE, h=64, page_size=16, dtype='bfloat16', return_lse=True
    ),
    'chunks_bf16': dict(
      query_lens=(110, 0, 5, 1),
      kv_lens=(125, 0, 5, 61),
      num_tokens=120,
      h=64,
      page_size=16,
      dtype='bfloat16',
      window=50,
      soft_cap=2.0,
      sinks=True,
      return_lse=True,
    ),
    'window_cap': dict(**_MIXED, window=6, soft_cap=2.0),
    'mqa_odd_head': dict(**_MIXED, k=1, h=24, page_size=3, pages_per_seq=11),
    'long': dict(
      query_lens=(40, 1), kv_lens=(600, 350), page_size=16, pages_per_seq=40
    ),
    # Long enough for the largest tiles of XLA's version.
    'long_chunks': dict(
      query_lens=(300, 250),
      kv_lens=(600, 250),
      page_size=16,
      pages_per_seq=40,
      soft_cap=9.0,
    ),
    'sinks_lse': dict(**_MIXED, window=6, sinks=True, return_lse=True),
    'decode_int8': dict(
      **_DECODE, h=64, page_size=16, pages='int8', return_lse=True
    ),
    'mixed_fp8_bf16': dict(
      **_MIXED, h=128, page_size=32, pages='float8_e4m3fn', dtype='bfloat16'
    ),
    'decode_int4': dict(**_DECODE, page_size=8, pages='int4', sinks=True),
    'tree': dict(
      query_lens=(9, 1, 40), kv_lens=(20, 7, 64), page_size=8, tree=True
    ),
    'part_decode': dict(
      query_lens=(1, 1, 1, 0, 1),
      kv_lens=(5, 3, 32, 0, 29),
      return_lse=True,
      part=1,
    ),
    'part_decode_window': dict(
      query_lens=(1, 2, 0, 1, 1),
      kv_lens=(31, 30, 0, 9, 27),
      num_tokens=5,
      window=9,
      sinks=True,
      return_lse=True,
      part=0,
    ),
    'part_mixed': dict(**_MIXED, soft_cap=3.0, return_lse=True, part=0),
    'part_window': dict(
      query_lens=(40, 1, 9),
      kv_lens=(600, 350, 512),
      page_size=16,
      pages_per_seq=40,
      window=70,
      return_lse=True,
      part=2,
    ),
    'part_long_chunk': dict(
      query_lens=(300,),
      kv_lens=(600,),
      page_size=16,
      pages_per_seq=40,
      window=210,
      return_lse=True,
      part=4,
    ),
    'part_int8': dict(
      **_DECODE, h=64, page_size=16, pages='int8', return_lse=True, part=0
    ),
    'part_tree': dict(
      query_lens=(9, 1, 40), kv_lens=(20, 7, 64), page_size=8, tree=True, part=3
    ),
    'tree_int8': dict(
      query_lens=(5, 5), kv_lens=(20, 5), tree=True, soft_cap=5.0, pages='int8'
    ),
  }.items()
}
_CPU = dict(n=8, k=4, h=64, page_size=32, pages_per_seq=16, layers=1)
MODEL = {
  # A 27 M parameter model with 32 requests of 60 to 170 tokens.
  'cpu_decode_b32': functools.partial(
    _case, query_lens=(1,) * 32, kv_lens=tuple(range(60, 172, 7)) * 2, **_CPU
  ),
  'cpu_prefill_chunk_b32': functools.partial(
    _case,
    query_lens=(1,) * 16 + (120, 120) + (0,) * 14,
    kv_lens=tuple(range(60, 172, 7)) + (120, 500) + (0,) * 14,
    **_CPU,
  ),
  'llama3_8b_decode_b64_2k': functools.partial(
    _case,
    query_lens=(1,) * 64,
    kv_lens=(2048,) * 64,
    n=32,
    k=8,
    h=128,
    page_size=16,
    pages_per_seq=128,
    layers=1,
    dtype='bfloat16',
  ),
}


def _abstract(*, query_lens, kv_lens, page_size, n=32, k=8, h=128):
  """As `_case`, of bfloat16 arrays without values."""
  pages_per_seq = -(-max(kv_lens) // page_size)
  num_seqs = len(kv_lens)
  table = np.random.default_rng(0).permutation(num_seqs * pages_per_seq)
  starts = np.concatenate([[0], np.cumsum(query_lens)])
  pool = jax.ShapeDtypeStruct(
    (1, table.size + 1, k, page_size, h), jnp.bfloat16
  )
  return dict(
    args=(
      jax.ShapeDtypeStruct((int(starts[-1]), n, h), jnp.bfloat16),
      pool,
      pool,
      jnp.int32(0),
      jnp.array(starts, jnp.int32),
      jnp.array(kv_lens, jnp.int32),
      jnp.array(table.reshape(num_seqs, pages_per_seq), jnp.int32),
      *(None,) * 6,
    ),
    kwargs=dict(scale=h**-0.5, soft_cap=None, return_lse=False),
  )


TPU = {
  'decode_b64_2k_page16': functools.partial(
    _abstract, query_lens=(1,) * 64, kv_lens=(2048,) * 64, page_size=16
  ),
  'prefill_4k_page16': functools.partial(
    _abstract, query_lens=(4096,), kv_lens=(4096,), page_size=16
  ),
  'mixed_b32_2k_page128': functools.partial(
    _abstract,
    query_lens=(1,) * 32 + (2048,),
    kv_lens=(2048,) * 33,
    page_size=128,
  ),
}
