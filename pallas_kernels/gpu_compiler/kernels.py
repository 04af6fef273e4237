"""What the compiler says of one kernel."""

import dataclasses
import functools
import pathlib
import re

from pallas_kernels.gpu_compiler import sass
from pallas_kernels.gpu_compiler.sass import Loop

_NUMBERS = {
  'registers': r'Used (\d+) registers',
  'spill_stores': r'(\d+) bytes spill stores',
  'spill_loads': r'(\d+) bytes spill loads',
  'stack_bytes': r'(\d+) bytes stack frame',
}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One Mosaic GPU kernel.

  Attributes:
    name: That it was given.
    registers: Of a thread at the start; `set_max_registers` moves them later.
    spill_bytes: Stored to and loaded from local memory, per thread.
    stack_bytes: Of a thread.
    warnings: Lines of ptxas, such as that WGMMAs are serialized.
    listing: Machine code, with control codes.
  """

  name: str
  registers: int
  spill_bytes: int
  stack_bytes: int
  warnings: tuple[str, ...]
  listing: str = dataclasses.field(repr=False)

  @functools.cached_property
  def loops(self) -> tuple[Loop, ...]:
    """See `sass.loops`."""
    return sass.loops(self.listing)

  @property
  def main_loop(self) -> Loop:
    """Where the tensor cores could be busiest, the innermost such loop.

    Without any work for them, the longest loop.
    """
    if not self.loops:
      raise ValueError(f'{self.name} has no loop')
    return max(self.loops, key=self._importance)

  def _importance(self, loop):
    length = loop.issue_cycles
    return loop.tensor_share, -length if loop.tensor_cycles else length


def read(folder: pathlib.Path) -> tuple[Kernel, ...]:
  """Kernels that the compiler has dumped in a folder."""
  kernels = []
  for path in sorted(folder.glob('*.ptxas')):
    text = path.read_text()
    numbers = {
      name: int(m.group(1)) if (m := re.search(pattern, text)) else 0
      for name, pattern in _NUMBERS.items()
    }
    listing = path.with_suffix('.sass_ctrl')
    kernels.append(
      Kernel(
        name=re.search(r"entry function '(\w+)'", text).group(1),
        registers=numbers['registers'],
        spill_bytes=numbers['spill_stores'] + numbers['spill_loads'],
        stack_bytes=numbers['stack_bytes'],
        warnings=tuple(
          line.strip()
          for line in text.splitlines()
          if 'warning' in line.lower() or 'serializ' in line.lower()
        ),
        listing=listing.read_text() if listing.exists() else '',
      )
    )
  return tuple(kernels)
