"""Which activations of a layer are kept for the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost",
https://arxiv.org/abs/1604.06174: drop activations and compute them again. A
policy says which results of a layer are kept; its input always is.
"""

from collections.abc import Callable
import types
from typing import Any

import jax

# Name -> policy of `jax.checkpoint`; `None` keeps everything.
POLICIES = types.MappingProxyType(
  {
    # No recomputation, most memory.
    'none': None,
    # Results of all matrix products, attention scores among them.
    'dots': jax.checkpoint_policies.dots_saveable,
    # Results of products with weights; attention is recomputed. Memory per
    # layer is linear in the sequence length. The usual choice.
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Only the layer's input: least memory, about a third more FLOPs.
    'full': jax.checkpoint_policies.nothing_saveable,
  }
)


def get(name: str) -> Callable[..., Any] | None:
  """The value of `Transformer(remat=...)` for a policy name.

  Raises:
    ValueError: An unknown name; lists what is known.
  """
  if name not in POLICIES:
    raise ValueError(
      f'unknown remat policy {name!r}; known: {", ".join(POLICIES)}'
    )
  return POLICIES[name]
