"""What every constraint implements: host objects, no JAX.

A `Constraint` compiles a text into a `Grammar`, of which each continuation has
a `Matcher`. After every token the matcher says which tokens may come next, as
the mask that `samplers.base.RowState` holds.

Letters: V vocab, W = ceil(V / 32) words of a mask.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt32
import numpy as np

from jaxtrain.checkpoints.tokenizer import Tokenizer


@runtime_checkable
class Matcher(Protocol):
  """Where one text is in its grammar.

  Attributes:
    is_done: The text is complete, and nothing but a stop token can follow. A
      text that is complete and can also go on is not done.
    error: Why it can neither go on nor end (the grammar takes too much time or
      memory here), else `None`.
  """

  is_done: bool
  error: str | None

  def mask(self) -> UInt32[np.ndarray, 'W']:
    """Bit `v % 32` of word `v // 32` is set if token v may come next.

    The tokenizer's stop tokens may exactly where the text may end. No bit is
    set past the vocabulary, nor anywhere after an `error`, nor once `is_done`
    if the tokenizer has no stop tokens. The array is the caller's.
    """
    ...

  def accept(self, token: int) -> bool:
    """Goes on with a token; if it may not come next, nothing changes."""
    ...


@runtime_checkable
class Grammar(Protocol):
  """A set of texts, shared by the continuations that are to be in it."""

  def start(self) -> Matcher:
    """A matcher of the empty text; matchers share no state that changes."""
    ...


@runtime_checkable
class Constraint(Protocol):
  """Compiles grammars, and keeps those it has compiled.

  May be called from several threads.
  """

  def compile(
    self,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
  ) -> Grammar:
    """The grammar of the schema or regular expression; one of them is given.

    Args:
      tokenizer: Whose tokens they are.
      vocab_size: V, of the model: it may know more tokens.
      json_schema: The text is JSON that this schema accepts.
      regex: All of the text matches this.

    Raises:
      ValueError: It cannot be compiled, or for these tokens; why is named.
    """
    ...
