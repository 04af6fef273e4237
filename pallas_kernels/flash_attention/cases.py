"""Named inputs shared by the contract test and the benchmark.

A case is `key -> dict(args, kwargs, diff)`: arrays, static arguments, and the
indices of the arrays to differentiate.
"""

import functools

import jax
import jax.numpy as jnp


def _case(
  key,
  *,
  b=2,
  t=48,
  n=4,
  k=2,
  h=16,
  dtype='float32',
  segments=False,
  window=None,
  soft_cap=None,
):
  kq, kk, kv, ks = jax.random.split(key, 4)
  q = jax.random.normal(kq, (b, t, n, h), dtype)
  key_ = jax.random.normal(kk, (b, t, k, h), dtype)
  value = jax.random.normal(kv, (b, t, k, h), dtype)
  ids = None
  if segments:
    ids = jnp.cumsum(jax.random.bernoulli(ks, 4 / t, (b, t)), 1, jnp.int32)
  window = None if window is None else jnp.int32(window)
  return dict(
    args=(q, key_, value, ids, window),
    kwargs=dict(scale=h**-0.5, soft_cap=soft_cap),
    diff=(0, 1, 2),
  )


SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'causal': dict(),
    'bf16': dict(dtype='bfloat16'),
    'mha': dict(k=4),
    'mqa_odd': dict(k=1, t=37, h=24),
    'segments': dict(segments=True),
    'window': dict(window=9),
    'soft_cap': dict(soft_cap=2.0),
    'everything': dict(t=300, segments=True, window=70, soft_cap=3.0, b=1),
    'one_token': dict(t=1),
  }.items()
}
MODEL = {
  'llama3_8b_4k': functools.partial(
    _case, b=1, t=4096, n=32, k=8, h=128, dtype='bfloat16'
  ),
  'gemma3_1b_4k_local': functools.partial(
    _case, b=1, t=4096, n=4, k=1, h=256, dtype='bfloat16', window=512
  ),
}
