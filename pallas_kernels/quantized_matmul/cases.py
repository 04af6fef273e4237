"""Named inputs shared by the contract test and the benchmark.

A case is a function of a key that returns `args` and `kwargs` (static).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import quantize


def _case(
  key,
  m,
  k,
  n,
  weights='int8',
  dtype='bfloat16',
  group_size=None,
  zero_points=False,
  **kwargs,
):
  keys = jax.random.split(key, 3)
  x = jax.random.normal(keys[0], (m, k), dtype)
  matrix = jax.random.normal(keys[1], (k, n)) * k**-0.5
  values, scales = quantize.quantize_weights(
    matrix, weights, group_size=group_size
  )
  zeros = None
  if zero_points:
    zeros = jax.random.randint(keys[2], scales.shape, -8, 8, jnp.int8)
  return dict(args=(x, values, scales, zeros), kwargs=kwargs)


SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'w8a16': dict(m=5, k=100, n=72),
    'w8a16_f32': dict(m=20, k=64, n=300, dtype='float32'),
    'e4m3_a16': dict(m=5, k=100, n=72, weights='float8_e4m3fn'),
    'e5m2_a16_f32': dict(
      m=5, k=100, n=72, weights='float8_e5m2', dtype='float32'
    ),
    'w8a8': dict(m=33, k=96, n=130, activations='int8'),
    'w8a8_f32': dict(m=3, k=96, n=64, dtype='float32', activations='int8'),
    'e4m3_a8': dict(
      m=9,
      k=96,
      n=130,
      weights='float8_e4m3fn',
      activations='float8_e4m3fn',
    ),
    'e4m3_a8_many_rows': dict(
      m=520,
      k=128,
      n=64,
      weights='float8_e4m3fn',
      activations='float8_e4m3fn',
    ),
    'w4a16_32': dict(m=5, k=256, n=130, weights='int4', group_size=32),
    'w4a16_64_zeros_f32': dict(
      m=20,
      k=256,
      n=64,
      weights='int4',
      group_size=64,
      zero_points=True,
      dtype='float32',
    ),
    'w4a16_128_to_f32': dict(
      m=5,
      k=384,
      n=64,
      weights='int4',
      zero_points=True,
      preferred_element_type=jnp.float32,
    ),
  }.items()
}
# The first product of an 8B model's feed-forward.
_UP = dict(k=4096, n=14336)
MODEL = {
  f'{scheme}_{phase}': functools.partial(_case, m=m, **_UP, **kw)
  for phase, m in {'decode': 32, 'prefill': 4096}.items()
  for scheme, kw in {
    'w8a16': dict(),
    'w8a8': dict(activations='int8'),
    'w4a16': dict(weights='int4'),
  }.items()
}


def _abstract(m, **kw):
  rest = {}

  def arrays():
    case = _case(jax.random.key(0), m, **kw)
    rest.update(kwargs=case['kwargs'])
    return case['args']

  return dict(args=jax.eval_shape(arrays), **rest)


TPU = {
  name: functools.partial(_abstract, **_UP, **kw)
  for name, kw in {
    'w8a16_decode': dict(m=32),
    'w8a8_prefill': dict(m=4096, activations='int8'),
    'w4a16_decode': dict(m=32, weights='int4', zero_points=True),
  }.items()
}
