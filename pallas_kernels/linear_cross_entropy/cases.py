"""Named inputs shared by the contract test and the benchmark.

A case is a function of a key that returns `args`, `kwargs` (static) and `diff`,
the indices of the arguments to differentiate.
"""

import functools

import jax
import jax.numpy as jnp


def _case(key, b, t, d, v, dtype='float32', head_dtype=None, **kwargs):
  keys = jax.random.split(key, 4)
  x = jax.random.normal(keys[0], (b, t, d), dtype)
  head = 2 * d**-0.5 * jax.random.normal(keys[1], (d, v), head_dtype or dtype)
  targets = jax.random.randint(keys[2], (b, t), 0, v)
  weights = jax.random.uniform(keys[3], (b, t))
  weights = jnp.where(weights < 0.25, 0.0, weights)
  return dict(args=(x, head, targets, weights), kwargs=kwargs, diff=(0, 1, 3))


SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'f32': dict(b=2, t=32, d=16, v=48, chunk=8),
    'chunk_does_not_divide': dict(b=3, t=29, d=8, v=31, chunk=6),
    'one_chunk': dict(b=2, t=7, d=8, v=16),
    'one_token': dict(b=1, t=1, d=8, v=16),
    'z_loss': dict(b=2, t=16, d=8, v=24, chunk=4, z_loss=1e-2),
    'soft_cap_and_z_loss': dict(
      b=2, t=16, d=8, v=24, chunk=4, logit_soft_cap=1.5, z_loss=1e-2
    ),
    'shards': dict(b=4, t=30, d=8, v=24, chunk=4, shards=(2, 3)),
    'bf16': dict(b=2, t=32, d=64, v=128, chunk=8, dtype='bfloat16'),
    'bf16_head_f32': dict(
      b=2, t=32, d=64, v=128, chunk=8, dtype='bfloat16', head_dtype='float32'
    ),
    'bf16_odd': dict(
      b=1,
      t=150,
      d=72,
      v=205,
      chunk=100,
      dtype='bfloat16',
      logit_soft_cap=3.0,
      z_loss=1e-2,
    ),
  }.items()
}


def _abstract(b, t, d, v, dtype='bfloat16', head_dtype=None, **kwargs):
  """A case without values, for compilers."""
  shape = jax.ShapeDtypeStruct
  tokens = (
    shape((b, t), 'int32'),
    shape((b, t), 'float32'),
  )
  x, head = shape((b, t, d), dtype), shape((d, v), head_dtype or dtype)
  return dict(args=(x, head, *tokens), kwargs=kwargs, diff=(0, 1))


TPU = {
  'llama3_8b': functools.partial(_abstract, b=1, t=4096, d=4096, v=128256),
  'gemma2_2b': functools.partial(
    _abstract,
    b=2,
    t=512,
    d=2304,
    v=25600,
    head_dtype='float32',
    logit_soft_cap=30.0,
    z_loss=1e-4,
  ),
}
MODEL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'llama_cpu': dict(b=8, t=256, d=256, v=8192),
    'llama3_8b_4k': dict(b=1, t=4096, d=4096, v=128256, dtype='bfloat16'),
  }.items()
}
