"""Products with weights of 8 or 4 bits, for serving.

W8A16, W8A8 (Dettmers et al., "LLM.int8()", https://arxiv.org/abs/2208.07339)
and W4A16 with scales of groups (Frantar et al., "GPTQ",
https://arxiv.org/abs/2210.17323; Lin et al., "AWQ",
https://arxiv.org/abs/2306.00978).
"""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.quantize import quantize_weights

__all__ = ['quantize_weights', 'quantized_matmul']
