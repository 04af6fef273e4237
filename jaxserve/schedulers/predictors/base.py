"""What every predictor implements: a host object, no JAX."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Predictor(Protocol):
  """Expects a length before it is known, and may learn from it afterwards."""

  def __call__(self, prompt: Sequence[int], max_tokens: int) -> float:
    """Expected number of generated tokens, or anything that ranks like it."""
    ...

  def observe(self, prompt: Sequence[int], num_generated: int) -> None:
    """Takes note of a request that has ended."""
    ...
