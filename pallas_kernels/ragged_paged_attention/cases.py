"""Named inputs shared by the contract test and the benchmark.

A case is `key -> dict(args, kwargs, diff)`: arrays, static arguments, and the
indices of the arrays to differentiate (none: an inference op).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


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
):
  kq, kk, kv, kp = jax.random.split(key, 4)
  num_seqs = len(kv_lens)
  num_pages = num_seqs * pages_per_seq + 3
  pool = (layers, num_pages, k, page_size, h)
  table = jax.random.permutation(kp, num_pages)[: num_seqs * pages_per_seq]
  starts = np.concatenate([[0], np.cumsum(query_lens)])
  num_tokens = num_tokens or int(starts[-1])
  window = None if window is None else jnp.int32(window)
  return dict(
    args=(
      jax.random.normal(kq, (num_tokens, n, h), dtype),
      jax.random.normal(kk, pool, dtype),
      jax.random.normal(kv, pool, dtype),
      jnp.int32(layers - 1),
      jnp.array(starts, jnp.int32),
      jnp.array(kv_lens, jnp.int32),
      table.reshape(num_seqs, pages_per_seq).astype(jnp.int32),
      window,
    ),
    kwargs=dict(scale=h**-0.5, soft_cap=soft_cap),
    diff=(),
    valid=int(starts[-1]),
  )


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
    'window_cap': dict(**_MIXED, window=6, soft_cap=2.0),
    'mqa_odd_head': dict(**_MIXED, k=1, h=24, page_size=3, pages_per_seq=11),
    'long': dict(
      query_lens=(40, 1), kv_lens=(600, 350), page_size=16, pages_per_seq=40
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
