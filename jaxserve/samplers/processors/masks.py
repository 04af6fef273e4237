"""Bits of a mask to one truth value per token.

Letters: U rows, V vocab, W = ceil(V / 32) words of a mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

_VECTOR = 128  # Words that one product takes.


def unpack(
  words: UInt32[Array, 'U W'], vocab_size: int
) -> Bool[Array, 'U {vocab_size}']:
  """Token v is bit `v % 32` of word `v // 32`.

  *Cost*: HBM: nothing but the words, where the result is used in place.
  """
  return jax.lax.platform_dependent(
    words,
    tpu=lambda words: unpack_by_product(words, vocab_size),
    default=lambda words: unpack_by_shift(words, vocab_size),
  )


def unpack_by_shift(
  words: UInt32[Array, 'U W'], vocab_size: int
) -> Bool[Array, 'U {vocab_size}']:
  """As anybody would."""
  bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)
  return (bits & 1).reshape(len(words), -1)[:, :vocab_size] != 0


def unpack_by_product(
  words: UInt32[Array, 'U W'], vocab_size: int
) -> Bool[Array, 'U {vocab_size}']:
  """For units that do not repeat a number along a vector, but multiply.

  The 32 bits of a word in a dimension of their own would take four times their
  place in a TPU's memory, and be moved to where the logits are. Here a matrix
  of zeros and ones takes each byte to its eight tokens; bytes are exact in
  bfloat16.
  """
  words = jnp.pad(words, ((0, 0), (0, -words.shape[1] % _VECTOR)))
  words = words.reshape(len(words), -1, _VECTOR)
  parts = [(words >> (8 * i)) & 0xFF for i in range(4)]
  bytes_ = jnp.concatenate(parts, axis=-1).astype(jnp.bfloat16)
  token = jnp.arange(32 * _VECTOR)
  source = token % 32 // 8 * _VECTOR + token // 32
  matrix = jnp.arange(4 * _VECTOR)[:, None] == source
  bytes_ = jnp.einsum(
    'ugb,bt->ugt',
    bytes_,
    matrix.astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  )
  bits = (bytes_.astype(jnp.int32) >> token % 8) & 1
  return bits.reshape(len(words), -1)[:, :vocab_size] != 0
