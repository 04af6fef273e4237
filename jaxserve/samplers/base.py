"""What every sampler implements, and the rows it reads.

Letters: U rows (one per request that samples in this step), V vocab, S rows of
the engine, M longest sequence, C biased tokens, E stop tokens, W = ceil(V / 32)
words of a mask.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
  """What the device keeps of every row of the engine between steps.

  `Any`, as programs are also traced for shapes alone.

  Attributes:
    history: Token at each position, run or sampled.
    bias_ids: Tokens with a bias; -1 is unused.
    bias: What is added to their logits.
    stop_ids: Tokens that end the row; -1 is unused.
    mask: Bit `v % 32` of word `v // 32` is set where token v is allowed.
  """

  history: Int[Any, 'S M']
  bias_ids: Int[Any, 'S C']
  bias: Float[Any, 'S C']
  stop_ids: Int[Any, 'S E']
  mask: UInt32[Any, 'S W']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Sampling parameters of each row, as data: no row is a special case.

  Attributes:
    row: Which row of the `RowState`; padding is past the last.
    prompt_len: Tokens of the prompt.
    features: Sum of 1 (penalties), 2 (bias), 4 (mask), 8 (minimum length); what
      is not among them is not looked at.
    temperature: 0 is greedy.
    top_k: 0 keeps the whole vocabulary.
    top_p: 1 keeps the whole vocabulary.
    min_p: 0 keeps the whole vocabulary.
    presence_penalty: Subtracted from the logits of generated tokens.
    frequency_penalty: The same, times how often.
    repetition_penalty: Divides positive logits, and multiplies negative ones,
      of tokens of the prompt and generated ones.
    min_position: Stop tokens cannot be drawn at positions before it.
    seed: A row's randomness is a function of its seed and position alone.
    position: Index, in its sequence, of the token to draw.
  """

  row: Int[Array, 'U']
  prompt_len: Int[Array, 'U']
  features: Int[Array, 'U']
  temperature: Float[Array, 'U']
  top_k: Int[Array, 'U']
  top_p: Float[Array, 'U']
  min_p: Float[Array, 'U']
  presence_penalty: Float[Array, 'U']
  frequency_penalty: Float[Array, 'U']
  repetition_penalty: Float[Array, 'U']
  min_position: Int[Array, 'U']
  seed: Int[Array, 'U']
  position: Int[Array, 'U']


@runtime_checkable
class Sampler(Protocol):
  """Draws one token a row from float32 logits.

  The logits of a row may be minus infinity, but not all of them: of rows for
  which `processors.can_draw` is false, any token comes back.
  """

  def __call__(
    self, logits: Float[Array, 'U V'], rows: Rows
  ) -> Int[Array, 'U']: ...

  def distribution(
    self, logits: Float[Array, 'U V'], rows: Rows
  ) -> Float[Array, 'U V']:
    """Log-probability with which each token is drawn; -inf is never."""
    ...
