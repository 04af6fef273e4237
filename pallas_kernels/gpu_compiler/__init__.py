"""The real GPU compiler without a GPU.

`compile_for(fn, *abstract_args)` compiles a function for an H200 on a laptop,
ptxas included: registers, spills, shared memory and warnings of each Mosaic GPU
kernel, and the machine code of its loops, counted.

`python -m pallas_kernels.gpu_compiler` fetches what it needs.
"""

from pallas_kernels.gpu_compiler.chips import CHIPS
from pallas_kernels.gpu_compiler.compile import Compiled
from pallas_kernels.gpu_compiler.compile import CompileError
from pallas_kernels.gpu_compiler.compile import NotInstalledError
from pallas_kernels.gpu_compiler.compile import compile_for
from pallas_kernels.gpu_compiler.compile import is_installed
from pallas_kernels.gpu_compiler.kernels import Kernel
from pallas_kernels.gpu_compiler.sass import Loop

__all__ = [
  'CHIPS',
  'CompileError',
  'Compiled',
  'Kernel',
  'Loop',
  'NotInstalledError',
  'compile_for',
  'is_installed',
]
