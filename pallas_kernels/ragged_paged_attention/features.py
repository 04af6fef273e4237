"""What block sizes of ragged_paged_attention depend on."""

from typing import Any


def features(q, k_pages, *args, **static) -> dict[str, Any]:
  """What describes an input to the tuner."""
  del args, static
  num_kv, page_size, head_dim = k_pages.shape[2:]
  return dict(
    dtype=str(k_pages.dtype),
    num_tokens=q.shape[0],
    group=q.shape[1] // num_kv,
    num_kv=num_kv,
    page_size=page_size,
    head_dim=head_dim,
  )
