"""Device side of the paged KV cache: one pool for all layers.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", https://arxiv.org/abs/2309.06180, section 4.2.

Letters: L layers, P pages, Z page size, K kv heads, H head dim, T tokens, C
pages copied at once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.kv_update import kv_update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """Keys and values of every layer. Page numbers are shared by all layers."""

  k: Float[Array, 'L P K Z H']
  v: Float[Array, 'L P K Z H']


def allocate(
  num_layers: int,
  num_pages: int,
  page_size: int,
  num_kv_heads: int,
  head_dim: int,
  dtype: jax.typing.DTypeLike,
  sharding: jax.sharding.Sharding | None = None,
) -> Pages:
  """Zeroed pools, created on their shards."""
  shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
  zeros = jax.jit(
    lambda: Pages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
    out_shardings=sharding,
  )
  return zeros()


def write(
  pages: Pages,
  layer: Int[Array, ''],
  slot: Int[Array, 'T'],
  k: Float[Array, 'T K H'],
  v: Float[Array, 'T K H'],
) -> Pages:
  """Stores new keys and values of one layer.

  Args:
    pages: Pools, updated in place where they are donated.
    layer: Layer to write.
    slot: `page * Z + offset` of each token; negative slots are not written.
    k: New keys.
    v: New values.

  Returns:
    The updated pools.
  """
  k_pages, v_pages, _, _ = kv_update(pages.k, pages.v, layer, slot, k, v)
  return Pages(k_pages, v_pages)


def copy(
  pages: Pages, source: Int[Array, 'C'], target: Int[Array, 'C']
) -> Pages:
  """Copies whole pages, of all layers; targets past the pool are dropped.

  All are read before any is written.
  """
  return put(pages, target, take(pages, source))


def take(pages: Pages, which: Int[Array, 'C']) -> Pages:
  """Whole pages, as a pool of their own."""
  return jax.tree.map(lambda x: x[:, which], pages)


def put(pages: Pages, which: Int[Array, 'C'], new: Pages) -> Pages:
  """Replaces whole pages; those past the pool are dropped."""
  return jax.tree.map(
    lambda x, y: x.at[:, which].set(y, mode='drop'), pages, new
  )
