"""Ground truth: every query row gathers its whole sequence, in float32."""

import jax
import jax.numpy as jnp


def ragged_paged_attention(
  q,
  k_pages,
  v_pages,
  layer,
  query_start,
  kv_len,
  page_table,
  window,
  *,
  scale,
  soft_cap,
):
  """See `api.ragged_paged_attention`."""
  rows = jnp.arange(q.shape[0])
  seq_T = jnp.searchsorted(query_start[1:], rows, side='right')
  seq_T = jnp.minimum(seq_T, kv_len.shape[0] - 1)
  position_T = kv_len[seq_T] - query_start[seq_T + 1] + rows
  group = q.shape[1] // k_pages.shape[2]

  def flat(pages_MKZH):
    pages_MZKH = pages_MKZH.swapaxes(1, 2)
    return pages_MZKH.reshape(-1, *pages_MZKH.shape[2:])

  def attend(q_NH, seq, position):
    k_SNH, v_SNH = (
      jnp.repeat(flat(pages[layer, page_table[seq]]), group, 1).astype(
        jnp.float32
      )
      for pages in (k_pages, v_pages)
    )
    s_NS = scale * jnp.einsum('NH,SNH->NS', q_NH.astype(jnp.float32), k_SNH)
    if soft_cap is not None:
      s_NS = soft_cap * jnp.tanh(s_NS / soft_cap)
    slots = jnp.arange(k_SNH.shape[0])
    seen = slots <= position
    if window is not None:
      seen &= position - slots < window
    # A padding row may lie past every length; it then sees one slot.
    seen |= (slots == 0) & ~seen.any()
    p_NS = jax.nn.softmax(jnp.where(seen, s_NS, -jnp.inf), axis=-1)
    v_SNH = jnp.where(seen[:, None, None], v_SNH, 0)
    return jnp.einsum('NS,SNH->NH', p_NS, v_SNH).astype(q.dtype)

  return jax.vmap(attend)(q, seq_T, position_T)
