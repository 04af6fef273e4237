"""Named inputs shared by the contract test and the benchmark.

A case is a function of a key that returns `args`, `kwargs` (static) and `diff`,
the indices of the arguments to differentiate.
"""

import functools

import jax
import jax.numpy as jnp


def _case(
  key, group_sizes, num_rows, k, n, dtype='float32', matrices=None, **kwargs
):
  keys = jax.random.split(key, 3)
  lhs = jax.random.normal(keys[0], (num_rows, k), dtype)
  rhs = jax.random.normal(keys[1], (len(group_sizes), k, n))
  scales, diff = None, (0, 1)
  if matrices is not None:
    rhs = jnp.round(40 * rhs) if matrices == 'int8' else rhs
    scales = jax.random.uniform(keys[2], rhs.shape[::2], minval=0.1)
    diff = (0,)
  return dict(
    args=(
      lhs,
      rhs.astype(matrices or dtype),
      jnp.array(group_sizes, jnp.int32),
      scales,
    ),
    kwargs=kwargs,
    diff=diff,
  )


def _even(key, num_groups, num_rows, k, n, **kwargs):
  sizes = [num_rows // num_groups] * num_groups
  return _case(key, sizes, num_rows, k, n, dtype='bfloat16', **kwargs)


SMALL = {
  name: functools.partial(_case, **kw)
  for name, kw in {
    'uneven_f32': dict(group_sizes=(3, 0, 150, 7), num_rows=160, k=24, n=40),
    'decode_f32': dict(
      group_sizes=(0, 1, 0, 2, 0, 0, 1, 0), num_rows=4, k=16, n=8
    ),
    'rows_left_over_f32': dict(group_sizes=(5, 0, 9), num_rows=33, k=8, n=12),
    'no_rows_used_f32': dict(group_sizes=(0, 0), num_rows=5, k=8, n=12),
    'one_group_f32': dict(group_sizes=(300,), num_rows=300, k=8, n=12),
    'uneven_bf16': dict(
      group_sizes=(60, 1, 3), num_rows=64, k=32, n=16, dtype='bfloat16'
    ),
    'boundaries_bf16': dict(
      group_sizes=(70, 0, 2, 3, 90),
      num_rows=181,
      k=72,
      n=136,
      dtype='bfloat16',
    ),
    'bf16_to_f32': dict(
      group_sizes=(10, 22),
      num_rows=32,
      k=32,
      n=16,
      dtype='bfloat16',
      preferred_element_type=jnp.float32,
    ),
    'int8': dict(
      group_sizes=(3, 0, 150, 7), num_rows=170, k=24, n=40, matrices='int8'
    ),
    'float8_e4m3_bf16': dict(
      group_sizes=(3, 20),
      num_rows=40,
      k=32,
      n=256,
      dtype='bfloat16',
      matrices='float8_e4m3fn',
    ),
    'float8_e5m2': dict(
      group_sizes=(3, 20), num_rows=40, k=32, n=24, matrices='float8_e5m2'
    ),
  }.items()
}
_MIXTRAL_DECODE = dict(num_groups=8, num_rows=64, k=4096, n=14336)
_QWEN3_PREFILL = dict(num_groups=128, num_rows=32768, k=2048, n=768)
MODEL = {
  'mixtral_8x7b_decode_b32': functools.partial(_even, **_MIXTRAL_DECODE),
  'mixtral_8x7b_decode_b32_int8': functools.partial(
    _even, **_MIXTRAL_DECODE, matrices='int8'
  ),
  'qwen3_30b_a3b_prefill_4k': functools.partial(_even, **_QWEN3_PREFILL),
}


def _abstract(num_groups, num_rows, k, n, matrices=None):
  shape = jax.ShapeDtypeStruct
  skewed = jnp.arange(num_groups) * (2 * num_rows) // num_groups**2
  return dict(
    args=(
      shape((num_rows, k), jnp.bfloat16),
      shape((num_groups, k, n), matrices or jnp.bfloat16),
      skewed.astype(jnp.int32),
      None if matrices is None else shape((num_groups, n), jnp.float32),
    ),
    diff=(0, 1) if matrices is None else (0,),
  )


TPU = {
  'qwen3_30b_a3b_prefill_4k': functools.partial(_abstract, **_QWEN3_PREFILL),
  'mixtral_8x7b_decode_b32_int8': functools.partial(
    _abstract, **_MIXTRAL_DECODE, matrices=jnp.int8
  ),
  'odd': functools.partial(
    _abstract, num_groups=3, num_rows=1000, k=300, n=1100
  ),
}
