"""Weights to 8 or 4 bits and back: symmetric absolute-maximum rounding.

Dettmers et al., "LLM.int8()", https://arxiv.org/abs/2208.07339, section 2.1,
per output channel; Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323,
section 4, for groups of rows. Four-bit values are packed eight to an int32:
of each 128 rows of a matrix, word r < 16 holds rows 32 p + r in its lower half
and 32 p + 16 + r in its upper half, p = 0..3 from the lowest bits on, each plus
8. So a shift of 16 words gives, in each half, 16 neighbours of the same group.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

PACKED_ROWS = 128
VALUES_PER_WORD = 8
OFFSET = 8
GROUP_SIZES = (32, 64, 128)
_BITS = 4
# Of the values of a word, in the order of the rows.
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
_LARGEST = {'int4': 7.0, 'int8': 127.0}


def quantize_weights(
  weights: Float[Array, 'K N'],
  dtype: DTypeLike = jnp.int8,
  *,
  group_size: int | None = None,
) -> tuple[Num[Array, 'R N'], Float[Array, 'N'] | Float[Array, 'G N']]:
  """Rounds weights to the nearest of a symmetric grid.

  Args:
    weights: Matrix, K inputs to N outputs.
    dtype: 'int8', 'float8_e4m3fn' or 'float8_e5m2' with a scale per output;
      'int4' with one per output and group of inputs.
    group_size: Inputs of a group for 'int4': 32, 64 or 128, which is what
      `None` means; `None` otherwise.

  Returns:
    Weights and float32 scales for `quantized_matmul`: `[K, N]` and `[N]`, or
    packed `[K / 8, N]` and `[K / group_size, N]`.

  Raises:
    ValueError: Another dtype or group size, or a K that 128 does not divide
      where values are packed.
  """
  dtype = jnp.dtype(dtype)
  known = ('int4', 'int8', 'float8_e4m3fn', 'float8_e5m2')
  if dtype.name not in known:
    raise ValueError(f'weights of {dtype}; known: {", ".join(known)}')
  packed = dtype == jnp.int4
  if group_size is not None and (not packed or group_size not in GROUP_SIZES):
    raise ValueError(
      f'{group_size=} for {dtype}: int4 has groups of {GROUP_SIZES}'
    )
  k, n = weights.shape
  if packed and k % PACKED_ROWS:
    raise ValueError(f'K={k} must be a multiple of {PACKED_ROWS} for int4')
  size = (group_size or PACKED_ROWS) if packed else k
  groups = weights.astype(jnp.float32).reshape(-1, size, n)
  values, scales = to_grid(groups, dtype, axis=1)
  if packed:
    return pack(values.reshape(k, n)), scales[:, 0]
  return values.reshape(k, n), scales[0, 0]


def to_grid(
  values: Float[Array, '...'], dtype: DTypeLike, axis: int
) -> tuple[Num[Array, '...'], Float[Array, '...']]:
  """Values in `dtype` and scales along `axis`, whose product they are about."""
  dtype = jnp.dtype(dtype)
  largest = _LARGEST.get(dtype.name)
  is_float = largest is None
  if is_float:
    largest = float(jnp.finfo(dtype).max)
  top = jnp.max(jnp.abs(values), axis=axis, keepdims=True)
  scales = jnp.where(top > 0, top, 1.0).astype(jnp.float32) / largest
  scaled = values / scales
  if not is_float:
    scaled = jnp.round(scaled)
  return jnp.clip(scaled, -largest, largest).astype(dtype), scales


def pack(values: Num[Array, 'K N']) -> Int[Array, 'W N']:
  """Packs integers from -8 to 7 into words; K is a multiple of 128."""
  k, n = values.shape
  words = PACKED_ROWS // VALUES_PER_WORD
  parts = (values.astype(jnp.int32) + OFFSET).astype(jnp.uint32)
  parts = parts.reshape(k // PACKED_ROWS, VALUES_PER_WORD, words, n)
  shifts = jnp.array(SHIFTS, jnp.uint32)[:, None, None]
  packed = jnp.sum(parts << shifts, axis=1, dtype=jnp.uint32)
  packed = packed.reshape(k // VALUES_PER_WORD, n)
  return jax.lax.bitcast_convert_type(packed, jnp.int32)


def unpack(words: Int[Array, 'W N']) -> Int[Array, 'K N']:
  """The integers from -8 to 7, as int8."""
  rows, n = words.shape
  per_block = PACKED_ROWS // VALUES_PER_WORD
  blocks = words.reshape(-1, 1, per_block, n)
  shifts = jnp.array(SHIFTS, jnp.int32)[:, None, None]
  parts = (blocks >> shifts) & (2**_BITS - 1)
  return (parts - OFFSET).astype(jnp.int8).reshape(rows * VALUES_PER_WORD, n)
