"""Rotary position embedding, written where attention wants it.

Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, equation 34, in the
half-split layout of published weights.
"""

from pallas_kernels.rope.api import rope

__all__ = ['rope']
