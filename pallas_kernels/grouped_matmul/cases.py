"""Named inputs shared by the contract test and the benchmark.

A case is a function of a key that returns `args`, `kwargs` (static) and `diff`,
the indices of the arguments to differentiate.
"""

import functools

import jax
import jax.numpy as jnp


def _case(key, group_sizes, num_rows, k, n, dtype=jnp.float32, **kwargs):
  keys = jax.random.split(key)
  lhs = jax.random.normal(keys[0], (num_rows, k), dtype)
  rhs = jax.random.normal(keys[1], (len(group_sizes), k, n), dtype)
  return dict(
    args=(lhs, rhs, jnp.array(group_sizes, jnp.int32)),
    kwargs=kwargs,
    diff=(0, 1),
  )


def _even(key, num_groups, num_rows, k, n, dtype=jnp.bfloat16):
  sizes = [num_rows // num_groups] * num_groups
  return _case(key, sizes, num_rows, k, n, dtype)


SMALL = {
  'uneven_f32': functools.partial(
    _case, group_sizes=(3, 0, 150, 7), num_rows=160, k=24, n=40
  ),
  'decode_f32': functools.partial(
    _case, group_sizes=(0, 1, 0, 2, 0, 0, 1, 0), num_rows=4, k=16, n=8
  ),
  'rows_left_over_f32': functools.partial(
    _case, group_sizes=(5, 0, 9), num_rows=33, k=8, n=12
  ),
  'no_rows_used_f32': functools.partial(
    _case, group_sizes=(0, 0), num_rows=5, k=8, n=12
  ),
  'one_group_f32': functools.partial(
    _case, group_sizes=(300,), num_rows=300, k=8, n=12
  ),
  'uneven_bf16': functools.partial(
    _case,
    group_sizes=(60, 1, 3),
    num_rows=64,
    k=32,
    n=16,
    dtype=jnp.bfloat16,
  ),
  'bf16_to_f32': functools.partial(
    _case,
    group_sizes=(10, 22),
    num_rows=32,
    k=32,
    n=16,
    dtype=jnp.bfloat16,
    preferred_element_type=jnp.float32,
  ),
}
MODEL = {
  'mixtral_8x7b_decode_b32': functools.partial(
    _even, num_groups=8, num_rows=64, k=4096, n=14336
  ),
  'qwen3_30b_a3b_prefill_4k': functools.partial(
    _even, num_groups=128, num_rows=32768, k=2048, n=768
  ),
}
