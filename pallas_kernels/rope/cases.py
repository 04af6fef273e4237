"""Named inputs shared by the contract test and the benchmark.

A case is a function of a key that returns `args`, `kwargs` (static) and `diff`,
the indices of the arguments to differentiate.
"""

import functools

import jax
import jax.numpy as jnp


def _case(key, b, t, n, h, dtype='float32', shared=False):
  keys = jax.random.split(key)
  x = jax.random.normal(keys[0], (b, t, n, h), dtype)
  shape = (1 if shared else b, t, h // 2)
  angle = jax.random.uniform(keys[1], shape, maxval=100.0)
  return dict(args=(x, jnp.sin(angle), jnp.cos(angle)), kwargs={}, diff=(0,))


SMALL = {
  name: functools.partial(_case, **kwargs)
  for name, kwargs in {
    'f32': dict(b=2, t=16, n=2, h=128),
    'odd': dict(b=2, t=37, n=3, h=128, shared=True),
    'wide_head': dict(b=1, t=8, n=1, h=256),
    'narrow_head': dict(b=2, t=9, n=2, h=64),
    'bf16': dict(b=1, t=40, n=4, h=128, dtype='bfloat16'),
  }.items()
}
MODEL = {
  'llama3_8b': functools.partial(
    _case, b=1, t=8192, n=32, h=128, dtype='bfloat16'
  )
}


def _abstract(b, t, n, h):
  table = jax.ShapeDtypeStruct((b, t, h // 2), jnp.float32)
  x = jax.ShapeDtypeStruct((b, t, n, h), jnp.bfloat16)
  return dict(args=(x, table, table), kwargs={}, diff=(0,))


TPU = {
  'llama3_8b': functools.partial(_abstract, 1, 8192, 32, 128),
  'gemma2_2b': functools.partial(_abstract, 2, 1000, 8, 256),
}
