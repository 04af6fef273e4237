"""Output projection and cross-entropy in one, without a [B, T, V] array.

Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training",
https://arxiv.org/abs/2410.10989, section 3.2 (FusedLinearCrossEntropy).
"""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ['linear_cross_entropy']
