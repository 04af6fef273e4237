"""What every sampler implements, and the rows it reads.

Letters: U rows (one per request that samples in this step), V vocab.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Sampling parameters of each row, as data: no row is a special case.

  Attributes:
    temperature: 0 is greedy.
    top_k: 0 keeps the whole vocabulary.
    top_p: 1 keeps the whole vocabulary.
    min_p: 0 keeps the whole vocabulary.
    seed: A row's randomness is a function of its seed and position alone.
    position: Index, in its sequence, of the token to draw.
  """

  temperature: Float[Array, 'U']
  top_k: Int[Array, 'U']
  top_p: Float[Array, 'U']
  min_p: Float[Array, 'U']
  seed: Int[Array, 'U']
  position: Int[Array, 'U']


@runtime_checkable
class Sampler(Protocol):
  """Draws one token a row from float32 logits."""

  def __call__(
    self, logits: Float[Array, 'U V'], rows: Rows
  ) -> Int[Array, 'U']: ...
