"""Stores new keys and values in a paged KV cache."""

from pallas_kernels.kv_update.api import kv_update

__all__ = ['kv_update']
