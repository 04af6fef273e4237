"""Attention of ragged query runs over a paged KV cache."""

from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.shared_prefix import (
  shared_prefix_attention,
)

__all__ = ['ragged_paged_attention', 'shared_prefix_attention']
