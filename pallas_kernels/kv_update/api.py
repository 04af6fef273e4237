"""Public entry point of kv_update."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.common.dispatch import dispatch


def kv_update(
  k_pages: Num[Array, 'L P K Z H'],
  v_pages: Num[Array, 'L P K Z H'],
  layer: Int[Array, ''] | int,
  slot: Int[Array, 'T'],
  k_new: Float[Array, 'T K H'],
  v_new: Float[Array, 'T K H'],
  k_scales: Float[Array, 'L P K Z'] | None = None,
  v_scales: Float[Array, 'L P K Z'] | None = None,
  *,
  implementation: str | None = None,
) -> tuple[
  Num[Array, 'L P K Z H'],
  Num[Array, 'L P K Z H'],
  Float[Array, 'L P K Z'] | None,
  Float[Array, 'L P K Z'] | None,
]:
  """Stores the keys and values of one layer's new tokens in their slots.

  Kwon et al., "Efficient Memory Management for Large Language Model Serving
  with PagedAttention", https://arxiv.org/abs/2309.06180, section 5.1 (the fused
  reshape and block write). Quantised as in Frantar et al.'s symmetric grid,
  https://arxiv.org/abs/2210.17323, with one scale per token and head.

  Args:
    k_pages: Key pool, updated in place where it is donated.
    v_pages: Value pool, likewise.
    layer: Which layer of the pools to write.
    slot: `page * Z + offset` of each token, all different; a token whose slot
      is negative or past the pool is not stored.
    k_new: New keys.
    v_new: New values.
    k_scales: Scales of a quantised key pool (int8, float8 or int4), likewise
      updated: a stored number times its scale is the key.
    v_scales: The same for the values.
    implementation: 'reference', 'xla', 'pallas_tpu', 'pallas_gpu' or `None`.

  Returns:
    `(k_pages, v_pages, k_scales, v_scales)`, the scales `None` where none were
    given.

  Raises:
    ValueError: Shapes or dtypes that do not belong together.
  """
  num_kv, _, h = k_pages.shape[2:]
  new = (*slot.shape, num_kv, h)
  if k_pages.shape != v_pages.shape or not k_new.shape == v_new.shape == new:
    raise ValueError(
      f'kv_update: {k_new.shape=}, {v_new.shape=}, {slot.shape=} do not fit '
      f'{k_pages.shape=}, {v_pages.shape=}'
    )
  if (k_scales is None) != (v_scales is None):
    raise ValueError('scales of keys and values come together')
  if k_scales is None:
    if not jnp.issubdtype(k_pages.dtype, jnp.floating):
      raise ValueError(f'{k_pages.dtype} pages need k_scales and v_scales')
  elif not k_scales.shape == v_scales.shape == k_pages.shape[:4]:
    raise ValueError(
      f'one scale per token and head: {k_scales.shape=}, {v_scales.shape=} do '
      f'not fit {k_pages.shape=}'
    )
  return dispatch(
    'kv_update',
    k_pages,
    v_pages,
    jnp.asarray(layer, jnp.int32),
    slot,
    k_new,
    v_new,
    k_scales,
    v_scales,
    implementation=implementation,
  )
