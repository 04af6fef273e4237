"""Copies of a training state in the host's memory.

The copies are JAX arrays of the memory kind 'pinned_host', sharded as the
originals. The runtime orders a program that is given an original to overwrite
(donation) after the copy, so that no copy is ever torn.
"""

from typing import Any

import jax

from jaxtrain.checkpoints import abstract

_HOST = 'pinned_host'


def to_host(state: Any) -> Any:
  """Starts to copy `state` to its devices' hosts; returns at once.

  Args:
    state: Pytree of arrays (random keys too, which become integers).

  Returns:
    Tree of the structure of `state`. Leaves that are no `jax.Array` are as they
    were.
  """

  def one(leaf):
    if not isinstance(leaf, jax.Array):
      return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(_HOST))

  return jax.tree.map(one, abstract.without_keys(state))
