"""Rows sorted by group times one matrix per group (mixture of experts).

The block-sparse product of MegaBlocks: Gale et al., "MegaBlocks: Efficient
Sparse Training with Mixture-of-Experts", https://arxiv.org/abs/2211.15841.
"""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ['grouped_matmul']
