"""Draws tokens from truncated distributions."""

from pallas_kernels.sampling.api import sampling
from pallas_kernels.sampling.xla import keep

__all__ = ['keep', 'sampling']
