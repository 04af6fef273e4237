"""Named inputs shared by the contract test and the benchmark.

A case is a function of a key that returns `args`, `kwargs` (static) and `diff`,
the indices of the arguments to differentiate.
"""

import functools

import jax
import jax.numpy as jnp


def _case(key, shape, dtype='float32', residual=True, **kwargs):
  keys = jax.random.split(key, 3)
  x = 2 * jax.random.normal(keys[0], shape, dtype)
  scale = 1 + 0.3 * jax.random.normal(keys[1], shape[-1:])
  other = jax.random.normal(keys[2], shape, dtype) if residual else None
  diff = (0, 1, 2) if residual else (0, 1)
  return dict(args=(x, scale, other), kwargs=kwargs, diff=diff)


SMALL = {
  name: functools.partial(_case, shape=shape, **kwargs)
  for name, shape, kwargs in [
    ('plain', (2, 9, 128), dict(residual=False)),
    ('residual', (2, 16, 256), {}),
    ('odd', (3, 7, 40), dict(epsilon=1e-2)),
    ('gemma', (37, 128), dict(plus_one=True)),
    ('bf16', (2, 24, 384), dict(dtype='bfloat16')),
    ('heads', (1, 8, 3, 64), dict(dtype='bfloat16', residual=False)),
  ]
}
MODEL = {
  'llama3_8b': functools.partial(_case, shape=(1, 8192, 4096), dtype='bfloat16')
}


def _abstract(*shape, residual=True):
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  scale = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
  args = (x, scale, x if residual else None)
  return dict(args=args, kwargs={}, diff=(0, 1, 2) if residual else (0, 1))


TPU = {
  'llama3_8b': functools.partial(_abstract, 8192, 4096),
  'gemma2_2b': functools.partial(_abstract, 1000, 2304, residual=False),
}
