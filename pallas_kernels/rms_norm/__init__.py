"""Root-mean-square norm, with the residual addition before it.

Zhang and Sennrich, "Root Mean Square Layer Normalization",
https://arxiv.org/abs/1910.07467, equation 4.
"""

from pallas_kernels.rms_norm.api import rms_norm

__all__ = ['rms_norm']
