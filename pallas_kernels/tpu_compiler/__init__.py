"""The real TPU compiler without a TPU.

`compile_for(fn, *abstract_args, topology='v5e:2x2')` compiles any function for
one chip or a whole pod, on a laptop: memory by class, collectives, cost; and
for each Pallas kernel its schedule in cycles. `plan.plan` compiles it in many
layouts.
"""

from pallas_kernels.tpu_compiler.chips import CHIPS
from pallas_kernels.tpu_compiler.compile import CompileError
from pallas_kernels.tpu_compiler.compile import OutOfMemoryError
from pallas_kernels.tpu_compiler.compile import compile_built
from pallas_kernels.tpu_compiler.compile import compile_for
from pallas_kernels.tpu_compiler.result import Compiled
from pallas_kernels.tpu_compiler.result import Cost
from pallas_kernels.tpu_compiler.schedule import Schedule
from pallas_kernels.tpu_compiler.values import ScheduleError
from pallas_kernels.tpu_compiler.values import UnknownInstructionError
from pallas_kernels.tpu_compiler.values import UnknownValueError

__all__ = [
  'CHIPS',
  'CompileError',
  'Compiled',
  'Cost',
  'OutOfMemoryError',
  'Schedule',
  'ScheduleError',
  'UnknownInstructionError',
  'UnknownValueError',
  'compile_built',
  'compile_for',
]
