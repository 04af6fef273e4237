"""Exact attention that never stores the score matrix."""

from pallas_kernels.flash_attention.api import flash_attention

__all__ = ['flash_attention']
